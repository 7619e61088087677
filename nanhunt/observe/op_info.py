"""What an operation is: its name, what it writes, and whether it can make a non-finite value at all."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Outputs that hold whatever the memory held.
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_"}

# Operations that only move finite values or bound them: from untainted inputs they make untainted outputs, so the
# look is saved. A type conversion may overflow and is not among them; neither is anything with a constant that may be
# infinite.
CANNOT_CREATE = {
    *("abs", "cat", "clone", "expand", "flip", "gather", "index_select", "neg", "relu", "repeat", "roll", "sigmoid"),
    *(
        "sign",
        "sin",
        "cos",
        "split",
        "stack",
        "tanh",
        "tril",
        "triu",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "zero_",
    ),
    *("threshold_backward", "new_zeros", "unfold_backward", "slice_backward", "select_backward"),
}


# Operations in place that do not read what they write to; those with ``out=`` do not either.
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "bernoulli_"}

# Operations that write to the running statistics in training although their schema does not say so: the positions of
# the statistics and of the training flag.
_BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
_STATISTICS, _TRAINING = slice(3, 5), 5


class FocusReached(BaseException):
    """Ends a step whose remaining operations nobody needs; no handler of the user's for ``Exception`` may stop it."""


@dataclass
class FocusedOp:
    """The values of one operation, kept for the rules: arguments before it ran, outputs after."""

    op: str
    schema_names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()


def op_name(func: Any) -> str:
    """``aten::div_`` for ``aten.div_.Tensor``."""
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else str(func)


def written(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], bool]:
    """The arguments that the operation writes to (in place, ``out=``, lists), and whether it reads them before."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return [], True
    if not schema.is_mutable:
        if func.overloadpacket.__name__ in _BATCH_NORMS and args[_TRAINING]:
            return [tensor for tensor in args[_STATISTICS] if tensor is not None], True
        return [], True
    written: list[Tensor] = []
    is_read = func.overloadpacket.__name__ not in _OVERWRITES
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            is_read = is_read and not argument.is_out
    return written, is_read


def is_deliberate(args: Any, kwargs: Any, *, makes_nan: bool) -> bool:
    """Whether a plain number among the arguments accounts for the result: NaN for NaN, an infinity for infinities."""
    constants = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float) and not math.isfinite(leaf)]
    return any(math.isnan(constant) or not makes_nan for constant in constants)


def is_log_of_mask(name: str, args: Any) -> bool:
    """Whether it is the logarithm of exact zeros and ones that no gradient is wanted of."""
    if name != "log" or args[0].requires_grad:
        return False
    return bool(((args[0] == 0) | (args[0] == 1)).all())


def is_refusal(error: Exception) -> bool:
    """Whether an operation raised over the values it was given, not over shapes or types."""
    if isinstance(error, torch.linalg.LinAlgError):
        return True
    return isinstance(error, RuntimeError | ValueError) and bool(re.search(r"\b(nan|inf)\b", str(error), re.IGNORECASE))


def copied(values: Any) -> Any:
    """The same structure with copies of the tensors."""
    return torch.utils._pytree.tree_map(lambda leaf: copy_of(leaf) if isinstance(leaf, Tensor) else leaf, values)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy with its own memory; autograd's zero tensors get theirs here."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().clone()
