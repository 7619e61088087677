"""What the sentinel keeps of the step under way: references to batches and model inputs, and where the step began.

NOTE on what belongs to a step.

1. A step is all that was passed backward since the last optimizer step and not thrown away. A loop that drops its
   gradients (a ``GradScaler`` that saw an overflow, ``zero_grad`` after a batch it did not like) never reaches
   ``optimizer.step``; that its gradients are gone, or zero, is seen when the next backward pass begins.
2. A batch whose forward got no gradient at all did not take part: the loop went on to the next one.
3. Random generators and buffers are kept as they were before the first forward of the step, and before the first
   since the last backward, which takes its place if what came before was dropped.
4. The gradient of an output is noted by its autograd node. Hooks on tensors stay on them, are complained about when
   they are saved, and crash the process on a view whose base was written to (pytorch#196459).
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle, unserializable_hook

from nanhunt.capture.rng import RawStates
from nanhunt.observe.finite import stored_values
from nanhunt.observe.modes import unseen

MAX_CALLS = 64
"""Model calls kept per step. A loop that never steps must not fill the memory; what is older is dropped and said."""


@dataclass
class ModelCall:
    """One forward of the watched model: what went in, and the gradients that came back to its outputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    autocast: dict[str, Any]
    batch: int
    micro_step: int
    output_grads: dict[int, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def keep_gradients_of(self, output: Any) -> None:
        """Asks autograd for the gradients of the outputs (rule 4 of the NOTE)."""
        for position, tensor in enumerate(_tensors(output)):
            if not tensor.requires_grad:
                continue
            try:
                node = tensor.grad_fn
            except RuntimeError:
                # One of several views made at once, whose base was written to; nothing can be made of it.
                continue
            if node is not None:
                node.register_prehook(_of_output(tensor.output_nr, self._keeper(position)))
            else:
                # A parameter of the model or an input, which must not carry the hook for longer than the step.
                self.handles.append(tensor.register_hook(self._keeper(position)))

    def _keeper(self, position: int) -> Callable[[Tensor | None], None]:
        # The graph must not hold the inputs: where the loop writes outputs into them, they hold the graph.
        reference = weakref.ref(self)

        @unserializable_hook
        def keep(gradient: Tensor | None) -> None:
            call = reference()
            if call is not None and gradient is not None:
                with unseen():
                    call.output_grads[position] = gradient.detach()

        return keep

    def let_go(self) -> None:
        """Takes the hooks off tensors that outlive the step."""
        while self.handles:
            self.handles.pop().remove()

    @property
    def was_modified(self) -> bool:
        """Whether the loop has written into the inputs since."""
        return versions(self.args, self.kwargs) != self.versions


class Buffers:
    """The buffers of a model; its modules are walked again only if a module or the name of a buffer has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._walk()

    def _walk(self) -> None:
        named = [(f"{path}." if path else "", module) for path, module in self._model.named_modules()]
        self._children = [module._modules for _, module in named]
        self._owners = [module._buffers for _, module in named]
        self._seen = self._present()
        self._places = [(prefix + name, module._buffers, name) for prefix, module in named for name in module._buffers]

    def _present(self) -> tuple[list[nn.Module | None], list[str]]:
        """All modules, and the names of all buffers within theirs; compared by identity first, so it takes little."""
        modules = chain.from_iterable(map(dict.values, self._children))
        return list(modules), list(chain.from_iterable(self._owners))

    def copies(self) -> dict[str, Tensor]:
        """Their values, by the names of ``named_buffers``."""
        if self._present() != self._seen:
            self._walk()
        copies: dict[str, Tensor] = {}
        shown = set()
        for path, owner, name in self._places:
            buffer = owner[name]
            # A buffer that two modules share has the first of its names; a lazy one has no values yet.
            if buffer is not None and id(buffer) not in shown and not is_lazy(buffer):
                shown.add(id(buffer))
                copies[path] = buffer.detach().clone()
        return copies


@dataclass
class Start:
    """Random generators and buffers before a forward."""

    rng: RawStates
    buffers: dict[str, Tensor]


@dataclass
class _Batch:
    number: int
    micro_step: int
    value: Any


class KeptStep:
    """The step under way."""

    def __init__(self) -> None:
        self.calls: deque[ModelCall] = deque(maxlen=MAX_CALLS)
        self.losses: list[Tensor] = []
        self.num_calls = 0
        self._batches: deque[_Batch] = deque(maxlen=MAX_CALLS)
        self._num_batches = 0
        self._micro_step = 0
        self._start: Start | None = None
        self._latest: Start | None = None
        self._is_fresh = True
        self._gradient_version: int | None = None

    def note_batch(self, batch: Any) -> None:
        """A batch that the loop was given."""
        self._num_batches += 1
        self._batches.append(_Batch(self._num_batches, self._micro_step, batch))
        self._is_fresh = True

    def note_call(self, buffers: Buffers, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: Any) -> ModelCall:
        """A forward that is about to run."""
        if self._is_fresh:
            self._latest = Start(RawStates.now(), buffers.copies())
            self._start = self._start or self._latest
            self._is_fresh = False
        call = ModelCall(args, kwargs, versions(args, kwargs), autocast, self._num_batches, self._micro_step)
        if len(self.calls) == MAX_CALLS:
            self.calls[0].let_go()
        self.calls.append(call)
        self.num_calls += 1
        return call

    def begin_backward(self, roots: Iterable[Any], parameters: Iterable[Tensor]) -> None:
        """Notes the losses; forgets what came before the last backward pass if its gradients were dropped."""
        if self.losses and self._was_dropped(parameters):
            self.losses.clear()
            while self.calls and self.calls[0].micro_step != self._micro_step:
                self.calls.popleft().let_go()
            self.num_calls = len(self.calls)
            kept = [batch for batch in self._batches if batch.micro_step == self._micro_step]
            # A closure runs again on the batch it already has.
            self._batches = deque(kept or list(self._batches)[-1:], maxlen=MAX_CALLS)
            self._start = self._latest
        self.losses.extend(root.detach() for root in roots if isinstance(root, Tensor))
        del self.losses[:-MAX_CALLS]

    def end_backward(self, parameters: Iterable[Tensor]) -> None:
        """What comes now is another micro-step."""
        self._micro_step += 1
        self._is_fresh = True
        self._gradient_version = next((_version(p.grad) for p in parameters if p.grad is not None), None)

    def _was_dropped(self, parameters: Iterable[Tensor]) -> bool:
        """Rule 1 of the NOTE; values are read only if something was written into the gradients since."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients or self._gradient_version is None:
            return not gradients
        if _version(gradients[0]) == self._gradient_version:
            return False
        return not any(bool(stored_values(gradient).any()) for gradient in gradients)

    def taking_part(self, *, ended_in_error: bool) -> tuple[list[Any], list[ModelCall], Start | None]:
        """The batches and model calls that the step is made of (rule 2 of the NOTE), and where it began."""
        calls = [call for call in self.calls if call.output_grads]
        if ended_in_error:
            # The last batch is the one that failed; nothing could come back to its outputs.
            calls += [call for call in self.calls if call.micro_step == self._micro_step and not call.output_grads][-1:]
        calls = calls or list(self.calls)
        numbers = {call.batch for call in calls}
        chosen = [batch.value for batch in self._batches if batch.number in numbers]
        start = self._start if not calls or calls[0] is self.calls[0] else self._latest
        return chosen or [batch.value for batch in self._batches], calls, start

    def let_go(self) -> None:
        """Takes the hooks off tensors that outlive the step."""
        for call in self.calls:
            call.let_go()

    @property
    def start(self) -> Start | None:
        """Where the step began, as far as a forward was seen."""
        return self._start


def versions(*values: Any) -> list[int]:
    """Version counters of all tensors inside: how often they were written to."""
    return [_version(tensor) for tensor in _tensors(values)]


def _version(tensor: Tensor) -> int:
    """How often it was written to; a tensor of inference mode does not count it, and only there can be written to."""
    return 0 if tensor.is_inference() else tensor._version


def _of_output(number: int, keep: Callable[[Tensor | None], None]) -> Callable[[tuple[Tensor | None, ...]], None]:
    """For an autograd node, which is given the gradients of all its outputs."""
    return lambda gradients: keep(gradients[number])


def _tensors(values: Any) -> list[Tensor]:
    """All tensors inside, in the order of ``tree_leaves``; what models are usually given needs no search."""
    if isinstance(values, Tensor):
        return [values]
    if type(values) in (tuple, list, dict):
        inside = values.values() if type(values) is dict else values
        return [tensor for value in inside for tensor in _tensors(value)]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
