"""What a loop calls, seen from outside: one module, and the backward pass.

The module gets no hook: that would be copied, saved, scripted and compiled with it. Its class does, for as long as the
calls are followed, so that other modules are called as always and ``torch.compile`` sees them as they were written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.observe.patches import StandIn


class ModuleCalls:
    """Calls of one module.

    Args:
        module: The module.
        before: Called with the positional and the keyword arguments of every call.
        after: Called with what ``before`` gave, unless that is None, and the output.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        after: Callable[[Any, Any], None],
    ) -> None:
        self._module, self._before, self._after = module, before, after
        self._kind: type | None = None
        self._place: StandIn | None = None

    def follow(self) -> None:
        """Begins; also to be called where the module may have got another class, as lazy layers do."""
        kind = type(self._module)
        if kind is not self._kind:
            self.leave()
            self._kind = kind
            self._place = StandIn(kind, "__call__")
            self._place.put(self._function(self._place))

    def leave(self) -> None:
        """Ends it."""
        if self._place is not None:
            self._place.leave()
        self._kind = self._place = None

    def _function(self, place: StandIn) -> Callable[..., Any]:
        own, before, after = self._module, self._before, self._after

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # The first condition is what torch.compile sees of this, and spares it the others.
            if torch.compiler.is_compiling() or module is not own or not place.is_on:
                return place.inner(module, *args, **kwargs)
            noted = before(args, kwargs)
            output = place.inner(module, *args, **kwargs)
            if noted is not None:
                after(noted, output)
            return output

        return call


def stand_in_for_backward(before: Callable[[Any], None], after: Callable[[], None]) -> StandIn:
    """Shows the roots of every backward pass before it begins, and its end unless it raises.

    Args:
        before: Called with a tensor, or with several in a list or tuple.
        after: Called afterwards.
    """
    place = StandIn(torch.autograd, "backward")

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not place.is_on:
            return place.inner(tensors, *args, **kwargs)
        # An iterator can be gone through only once.
        roots = tensors if isinstance(tensors, Tensor | list | tuple) else tuple(tensors)
        before(roots)
        result = place.inner(roots, *args, **kwargs)
        after()
        return result

    place.put(backward)
    return place
