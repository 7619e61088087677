"""Whether memory that an operation has written over was non-finite before it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nanhunt.observe.finite import is_finite, stored_values

# From finite values these make an overflow at worst, never NaN.
_NEVER_NAN = ("add_", "sub_", "mul_", "addcmul_", "lerp_", "square_", "neg_", "relu_", "index_add_", "scatter_add_")
ONLY_MOVE = (
    *("index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "scatter_", "masked_fill_", "masked_scatter_"),
    "put_",
)
"""Of finite values these write none that is not; what they do not write to stays as it was."""
_SMALL = 1e18
"""Values whose product or sum cannot overflow float32."""


def was_nonfinite_before(name: str, result: Tensor, args: Any, kwargs: Any, *, makes_nan: bool) -> bool:
    """What can be told of the value that an in-place operation has destroyed.

    Args:
        name: ``add_``; in-place operations on lists are called ``_foreach_add_``.
        result: The memory after the operation.
        args: All positional arguments of the operation.
        kwargs: All others.
        makes_nan: Whether NaN is among its results.

    Returns:
        True where finite values could not have given the result: anything out of finite values that are only moved, NaN
        out of a sum or a product of finite numbers, or infinity where everything finite around it is small.
    """
    plain = name.removeprefix("_foreach_")
    leaves = tree_leaves((args, kwargs))
    if plain in ONLY_MOVE:
        return _is_plain_move(leaves)
    numbers = [leaf for leaf in leaves if isinstance(leaf, int | float)]
    if plain not in _NEVER_NAN or is_finite(result) or not all(abs(number) < _SMALL for number in numbers):
        return False
    if makes_nan:
        return True
    values = stored_values(result).detach()
    finite = values[torch.isfinite(values)]
    if finite.numel() and float(finite.abs().max()) > _SMALL:
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not result]
    others = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return values.dtype in (torch.float32, torch.float64, torch.bfloat16) and all(
        float(stored_values(other).abs().max()) < _SMALL for other in others
    )


def _is_plain_move(leaves: list[Any]) -> bool:
    """Whether nothing is summed or multiplied on the way, and no number that is put there is non-finite itself."""
    numbers = [leaf for leaf in leaves if isinstance(leaf, float)]
    return not any(isinstance(leaf, str) or leaf is True for leaf in leaves) and all(map(math.isfinite, numbers))
