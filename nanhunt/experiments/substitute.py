"""Replacing what one line of the user's code computes, without editing it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nanhunt.observe.source import user_frame
from nanhunt.records.ops import SourceLine

# Reflected operators and aliases arrive under their own names; a number over a tensor ends in ``reciprocal``.
_OPERATORS = {
    **{"true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"},
    **{"rdiv": "reciprocal", "rsub": "sub", "rpow": "pow"},
}

# What an aten operation and the function that ends in it may differ in: ``norm`` ends in ``linalg_vector_norm``. Any
# part of a name would be too much: ``exp`` is in ``expand``.
_AFFIXES = {"linalg", "vector", "native", "cudnn", "miopen", "forward", "ex", "copy"}


class Substitution(TorchFunctionMode):
    """Changes the inputs or outputs of one torch function wherever one source line calls it.

    Args:
        line: The user's line.
        op: Name of the aten operation that the function ends in, such as ``aten::_linalg_eigh``.
        inputs: Gives positional and keyword arguments to call with instead.
        outputs: Gives the result to return instead.
    """

    def __init__(
        self,
        line: SourceLine,
        op: str,
        *,
        inputs: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_calls = 0
        self._place, self._op = (line.file, line.line), _bare(op)
        self._inputs, self._outputs = inputs, outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_meant(func):
            return func(*args, **kwargs)
        self.num_calls += 1
        if self._inputs is not None:
            args, kwargs = self._inputs(args, kwargs)
        result = func(*args, **kwargs)
        return self._outputs(result) if self._outputs is not None else result

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        if exc_info[0] is None and self.num_calls == 0:
            raise LookupError(f"no call of {self._op} was found at line {self._place[1]}")

    def _is_meant(self, func: Any) -> bool:
        name = _bare(getattr(func, "__name__", ""))
        if not name or _core(name) != _core(self._op):
            return False
        frame = user_frame()
        return frame is not None and frame[:2] == self._place


def tensors_mapped(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Applies ``change`` to every floating-point tensor of a nested result."""
    return lambda result: tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, result
    )


def _bare(name: str) -> str:
    """``linalg_eigh`` for ``aten::_linalg_eigh``; ``pow`` for ``__rpow__``."""
    bare = name.rpartition("::")[2].strip("_")
    return _OPERATORS.get(bare, bare)


def _core(name: str) -> str:
    """``norm`` for ``linalg_vector_norm``."""
    return "_".join(part for part in name.split("_") if part not in _AFFIXES) or name
