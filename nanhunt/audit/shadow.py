"""The same operation in float64, and how far the result lies from it.

NOTE on what is compared.

1. The operation runs again on float64 copies of its own inputs, so that its error is its own: what earlier operations
   have lost is not counted again.
2. A sum may cancel; then its error is large beside the sum, although no digit of a term was lost. Of sums the error is
   taken beside the sum of the magnitudes, which is the same operation on the magnitudes of the inputs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nanhunt.observe.op_info import OpTraits, tensors_in
from nanhunt.records.dtype_audit import BEYOND, HALF, ShadowError

MAX_ELEMENTS = 2**24
"""Elements, inputs and outputs together, of an operation that runs again in float64."""

# Sums: of terms that are given, so that the same on magnitudes is the sum of magnitudes.
SUMS = frozenset(
    (
        *("sum", "nansum", "mean", "cumsum", "segment_reduce", "embedding_dense_backward"),
        *("index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "scatter_add", "scatter_add_"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    )
)
REDUCTIONS = SUMS | frozenset(
    (
        *("norm", "linalg_vector_norm", "var", "var_mean", "std", "std_mean", "_cdist_forward"),
        *("_softmax", "_log_softmax", "logsumexp", "logcumsumexp"),
        *("_embedding_bag", "_embedding_bag_forward_only", "scatter_reduce", "scatter_reduce_"),
    )
)
"""Without those of a backward pass that subtract a sum from what they get: there, cancellation is the rule."""

_HALF = frozenset(getattr(torch, name) for name in HALF if hasattr(torch, name))
_RANDOM = torch.Tag.nondeterministic_seeded


def is_half(dtype: torch.dtype) -> bool:
    """Whether it has less precision than float32."""
    return dtype in _HALF


def is_number(value: Any) -> bool:
    """Whether it is a tensor of floating-point or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def name_of(dtype: torch.dtype) -> str:
    """``float16``."""
    return str(dtype).removeprefix("torch.")


def eps_of(dtype: torch.dtype) -> float:
    """Spacing of the numbers just above 1."""
    return torch.finfo(dtype).eps


def wide(tensor: Tensor) -> Tensor:
    """A float64 or complex128 copy."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def can_run_again(func: Any, traits: OpTraits) -> bool:
    """Whether the same call gives the same again, and has anything to round at all."""
    if traits.is_collective or traits.is_foreach or traits.is_uninitialised or traits.converts:
        return False
    if _RANDOM in func.tags:
        return False
    returned = func._schema.returns
    return not (returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write)


def widened(values: Any) -> Any:
    """The arguments with copies of their tensors, in float64; types among them as well."""

    def convert(leaf: Any) -> Any:
        if is_number(leaf):
            return wide(leaf)
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        if isinstance(leaf, torch.dtype) and (leaf.is_floating_point or leaf.is_complex):
            return torch.complex128 if leaf.is_complex else torch.float64
        return leaf

    return tree_map(convert, values)


def magnitudes(values: Any) -> Any:
    """The same arguments without signs."""
    return tree_map(lambda leaf: leaf.abs() if is_number(leaf) else leaf, values)


def first_number(output: Any) -> Tensor | None:
    """The first floating-point or complex tensor of a result."""
    return next((tensor for tensor in tensors_in(output) if is_number(tensor)), None)


def compared(result: Tensor, shadow: Tensor, scale: Tensor | None = None) -> ShadowError | None:
    """How far a result lies from float64; None where there is nothing to compare.

    Args:
        result: What the operation gave.
        shadow: What it gave in float64.
        scale: What its error is taken beside; None for the float64 result itself.
    """
    if result.numel() == 0 or result.shape != shadow.shape:
        return None
    y, s = wide(result).reshape(-1), shadow.reshape(-1)
    known = s.isfinite()
    overflow, nan = known & y.isinf(), known & y.isnan()
    both = known & y.isfinite()
    distance, size = (y - s).abs()[both], s.abs()[both]
    relative = (distance / size)[size > 0]
    beside = scale.reshape(-1).abs()[both] if scale is not None and scale.shape == shadow.shape else size
    norm = float(beside.norm())
    is_normal = size[size > 0] >= torch.finfo(result.dtype).tiny
    to_zero = (y == 0) & known & (s.to(result.dtype) != 0)
    return ShadowError(
        num_elements=result.numel(),
        max_relative=float(relative.max()) if relative.numel() else 0.0,
        median_relative=float(relative.median()) if relative.numel() else 0.0,
        norm_relative=float(distance.norm()) / norm if norm else 0.0,
        num_beyond=int((is_normal & (relative > BEYOND * eps_of(result.dtype))).sum()),
        num_to_zero=int(to_zero.sum()),
        num_overflow=int(overflow.sum()),
        num_negative_overflow=int((overflow & (y.real < 0)).sum()),
        num_nan=int(nan.sum()),
        largest=float(s[known].abs().max()) if bool(known.any()) else math.nan,
    )
