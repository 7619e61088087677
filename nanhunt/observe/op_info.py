"""What an operation is: its name, what it writes, and whether it can make a non-finite value at all."""

import math
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


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation writes to: in place, ``out=``, and the lists of foreach operations."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return written


def has_nonfinite_constant(args: Any, kwargs: Any) -> bool:
    """Whether a plain number among the arguments is NaN or infinite."""
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves((args, kwargs)))


def copied(values: Any) -> Any:
    """The same structure with copies of the tensors."""
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, values
    )
