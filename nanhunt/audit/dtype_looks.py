"""What one operation loses: a conversion, a constant that vanishes, a 0-dim tensor that does not widen."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt.audit.shadow import is_half, is_number, name_of, wide
from nanhunt.observe.op_info import tensors_in
from nanhunt.records.dtype_audit import BatchTensor, Narrowing, OpPlace, VanishedConstant, ZeroDim

_LOST_SAMPLE = 0.01
"""Share of a sample, by norm, from which on underflow counts as its loss."""

_NOT_AN_EPS = 2.0**-10
"""Constants from here on are meant to change what they are added to; smaller ones guard against zero."""

_ADDITIONS = {"add", "add_", "sub", "sub_", "rsub"}
_CLAMPS = {"clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"}
_FILLINGS = {"full", "new_full", "full_like", "fill", "fill_"}


def is_narrower(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether the type has less range or less precision."""
    if not (target.is_floating_point or target.is_complex):
        return False
    if not (source.is_floating_point or source.is_complex):
        return is_half(target) and source not in (torch.bool, torch.uint8, torch.int8)
    this, other = torch.finfo(target), torch.finfo(source)
    return this.max < other.max or this.eps > other.eps


def narrowing(place: OpPlace, before: Tensor, after: Tensor, tensor: str) -> Narrowing:
    """What a conversion loses."""
    x, y = wide(before), wide(after)
    finite, used = x.isfinite(), x != 0
    limits = torch.finfo(after.dtype)
    # Types of 8 bits have no infinity: they give NaN, or their largest number.
    overflow = finite & (~y.isfinite() | (x.abs() > limits.max * (1 + limits.eps / 2)))
    to_zero = used & (y == 0)
    values = x[overflow]
    is_mask = bool(values.numel()) and not x.is_complex() and bool((values == values[0]).all() & (values[0] < 0))
    magnitudes = torch.where(finite, x.abs(), 0.0)
    gone = torch.where(to_zero, magnitudes, 0.0)
    rows, lost_rows = (
        (part.reshape(part.shape[0], -1).norm(dim=1) if part.dim() else part[None]) for part in (magnitudes, gone)
    )
    kept = finite & y.isfinite()
    return Narrowing(
        place,
        name_of(before.dtype),
        name_of(after.dtype),
        tensor=tensor,
        num_elements=x.numel(),
        num_overflow=int(overflow.sum()),
        is_mask=is_mask,
        largest=float(magnitudes.max()),
        num_nonzero=int(used.sum()),
        num_to_zero=int(to_zero.sum()),
        num_samples=int((rows > 0).sum()),
        num_samples_lost=int((lost_rows > _LOST_SAMPLE * rows).sum()),
        lost=_ratio(gone.norm(), magnitudes.norm()),
        spread_error=_ratio((x - y)[kept].norm(), (x[kept] - x[kept].mean()).norm()),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0


def batch_tensor(name: str, tensor: Tensor) -> BatchTensor:
    """How many values of a tensor in half are near or below the smallest normal number."""
    values = wide(tensor).abs()
    used = values[values > 0]
    subnormal = used < torch.finfo(tensor.dtype).tiny
    return BatchTensor(
        name,
        name_of(tensor.dtype),
        tensor.numel(),
        used.numel(),
        int(subnormal.sum()),
        float(used.min()) if used.numel() else 0.0,
    )


def zero_dim(tensors: list[Tensor], output: Tensor) -> ZeroDim | None:
    """The 0-dim tensor of a wider type that meets tensors of the result's type."""
    if not output.dim() or output.is_complex():
        return None
    found = [one for one in tensors if not one.dim() and is_number(one) and is_narrower(output.dtype, one.dtype)]
    if not found or found[0].is_complex():
        return None
    return ZeroDim(name_of(found[0].dtype), found[0].item(), found[0].to(output.dtype).item())


def vanished(name: str, place: OpPlace, args: Any, kwargs: Any, before: Tensor | None, output: Tensor) -> Any:
    """The constants of one operation that have no effect.

    Args:
        name: Name of the operation.
        place: Where it ran.
        args: Its positional arguments.
        kwargs: Its others.
        before: What its first tensor held before it ran.
        output: Its result.
    """
    if output.is_complex() or not output.is_floating_point() or not output.numel():
        return ()
    if name in _ADDITIONS:
        return tuple(_addends(place, args, kwargs, before, output))
    if name in _CLAMPS:
        return tuple(_bounds(name, place, args, kwargs, output))
    return tuple(_fillings(name, place, args, kwargs, output)) if name in _FILLINGS else ()


def watches_constants(name: str) -> bool:
    """Whether operations of this name take constants that may vanish."""
    return name in _ADDITIONS or name in _CLAMPS or name in _FILLINGS


def _addends(place: OpPlace, args: Any, kwargs: Any, before: Tensor | None, output: Tensor) -> Iterator[Any]:
    constant = _plain(args[1]) if len(args) > 1 else None
    if constant is None or before is None or not before.dim() or before.dtype != output.dtype:
        return
    constant *= float(kwargs.get("alpha", 1))
    rounded = torch.tensor(constant, dtype=torch.float64).to(output.dtype).item()
    if not constant or not -torch.inf < constant < torch.inf:
        return
    finite = before.isfinite()
    is_void = rounded == 0.0 or (is_half(output.dtype) and abs(constant) >= _NOT_AN_EPS)
    if is_void and bool(finite.any()) and torch.equal(before[finite].abs(), output[finite].abs()):
        yield VanishedConstant(place, name_of(output.dtype), "addend", constant, rounded, output.numel())


def _bounds(name: str, place: OpPlace, args: Any, kwargs: Any, output: Tensor) -> Iterator[VanishedConstant]:
    given = [*args[1:], None, None]
    if "_m" in name:
        given = [None, *given] if "_max" in name else [given[0], None]
    low = _plain(kwargs.get("min", given[0]))
    high = _plain(kwargs.get("max", given[1]))
    values, dtype = wide(output), name_of(output.dtype)
    for kind, bound, limit in (("lower bound", low, 0.0), ("upper bound", high, 1.0)):
        if bound is None or not 0.0 < bound < 1.0:
            continue
        rounded = torch.tensor(bound, dtype=torch.float64).to(output.dtype).item()
        if rounded == limit:
            beyond = (values < bound) if kind == "lower bound" else (values > bound)
            yield VanishedConstant(
                place,
                dtype,
                kind,  # type: ignore[arg-type]
                bound,
                rounded,
                output.numel(),
                int(beyond.sum()),
            )


def _fillings(name: str, place: OpPlace, args: Any, kwargs: Any, output: Tensor) -> Iterator[VanishedConstant]:
    position = 2 if name == "new_full" else 1
    value = _plain(args[position] if len(args) > position else kwargs.get("fill_value", kwargs.get("value")))
    if value and -torch.inf < value < torch.inf and not bool(output.any()):
        yield VanishedConstant(place, name_of(output.dtype), "filling", value, 0.0, output.numel())


def _plain(value: Any) -> float | None:
    """The value of a plain number or a 0-dim tensor."""
    if isinstance(value, Tensor):
        return float(value) if not value.dim() and value.dtype.is_floating_point else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def floating(values: Any) -> list[Tensor]:
    """The floating-point and complex tensors among arguments."""
    return [tensor for tensor in tensors_in(values) if is_number(tensor)]
