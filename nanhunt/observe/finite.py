"""Whether tensors are finite, as cheaply as the values allow.

A sum is one pass at memory speed and cannot hide a NaN or an infinity, but may overflow without one; it is therefore
the first look, and only a non-finite sum pays for the exact count.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from nanhunt.records.ops import ValueFacts
from nanhunt.records.steps import Tally

# Sums in these types overflow at a few thousand ordinary values, so they are summed in float32.
_SUMMED_WIDER = (torch.float16,)
# Below this many elements, copying a tensor next to others costs less than a call of its own.
_SMALL = 16384
_FEW = 3
_PLAIN_FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16))
_FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))


def can_hold_nonfinite(tensor: Tensor) -> bool:
    """Whether the type has NaN or infinities at all."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def unreadable_kind(tensor: Tensor) -> str | None:
    """Why the values cannot be looked at (meta, nested, compressed sparse), or None if they can."""
    if is_functorch_wrapped_tensor(tensor):
        return "tensor of torch.func"
    if type(tensor) is not Tensor and is_lazy(tensor):
        return "lazy parameter"
    if tensor.is_meta or type(tensor) is FakeTensor:
        return "meta tensor"
    if tensor.is_nested:
        return "nested tensor"
    if tensor.layout is not torch.strided and tensor.layout is not torch.sparse_coo:
        return f"{str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_quantized:
        return "quantized tensor"
    return None


def stored_values(tensor: Tensor) -> Tensor:
    """The tensor itself; for a sparse one in coordinates the dense tensor of its values, uncoalesced."""
    return tensor.detach()._values() if tensor.layout is torch.sparse_coo else tensor


def _plain(tensor: Tensor) -> Tensor:
    """The values without autograd, in a type that reductions support."""
    values = _elements(tensor)
    return torch.view_as_real(values.resolve_conj()) if values.dtype.is_complex else values


def _elements(tensor: Tensor) -> Tensor:
    values = stored_values(tensor).detach()
    return values.to(torch.float32) if values.dtype in _FLOAT8 else values


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; true for empty tensors and types without NaN. Reads one scalar back."""
    if tensor.dtype in _PLAIN_FLOATS and tensor.layout is torch.strided and not tensor._is_zerotensor():
        total = tensor.detach().sum().item()
        return total - total == 0.0 or nonfinite_kinds(tensor) == (False, False)
    if not can_hold_nonfinite(tensor) or tensor.numel() == 0 or tensor._is_zerotensor():
        # A zero tensor, as autograd makes them, has no memory to read.
        return True
    values = _plain(tensor)
    total = values.sum(dtype=torch.float32).item() if values.dtype in _SUMMED_WIDER else values.sum().item()
    return math.isfinite(total) or nonfinite_kinds(tensor) == (False, False)


def nonfinite_kinds(tensor: Tensor) -> tuple[bool, bool]:
    """Whether it holds NaN, and whether, holding none, it holds infinities: one pass, two scalars read back."""
    if not can_hold_nonfinite(tensor) or tensor.numel() == 0 or tensor._is_zerotensor():
        return False, False
    low, high = (bound.item() for bound in torch.aminmax(_plain(tensor)))
    has_nan = math.isnan(low) or math.isnan(high)
    return has_nan, not has_nan and (math.isinf(low) or math.isinf(high))


def sums(tensors: Sequence[Tensor]) -> Tensor | None:
    """The float64 sums of the tensors, stacked on the CPU with one read per device; None if there is nothing to sum."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if can_hold_nonfinite(tensor) and tensor.numel() and unreadable_kind(tensor) is None:
            values = _plain(tensor)
            total = values.sum(dtype=torch.float32) if values.dtype in _SUMMED_WIDER else values.sum()
            by_device.setdefault(tensor.device, []).append(total.to(torch.float64))
    stacks = [torch.stack(totals).cpu() for totals in by_device.values()]
    return torch.cat(stacks) if stacks else None


def list_is_finite(tensors: Sequence[Tensor]) -> bool:
    """The same as ``all_finite`` for results of operations: often few, and perhaps zero tensors of autograd's."""
    if len(tensors) <= _FEW:
        return all(unreadable_kind(tensor) is not None or is_finite(tensor) for tensor in tensors)
    # A zero tensor, as autograd makes them, has no memory to read.
    return all_finite([tensor for tensor in tensors if not tensor._is_zerotensor()])


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is finite; what cannot be read is passed over.

    Reads one scalar back where all tensors share a device.
    """
    total = _total(tensors)
    if total is not None and math.isfinite(total):
        return True
    totals = sums(tensors)
    if totals is None or math.isfinite(totals.sum().item()):
        return True
    return all(is_finite(tensor) for tensor in tensors if unreadable_kind(tensor) is None)


def _total(tensors: Sequence[Tensor]) -> float | None:
    """The sum over all tensors, in as few calls as there can be; None if they are not as alike as that takes.

    Which kinds of tensors can be put together is left to torch to say, for asking each of its kind takes as long as
    the sum.
    """
    small: list[Tensor] = []
    parts: list[Tensor] = []
    try:
        for tensor in tensors:
            if tensor.numel() < _SMALL:
                small.append(tensor)
            else:
                parts.append(_wide_sum(tensor))
        if small:
            parts.append(_wide_sum(torch._utils._flatten_dense_tensors(small)))
        total = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        return None if total.is_complex() else total.item()
    except (RuntimeError, NotImplementedError, IndexError):
        # Sparse, meta and nested tensors, several devices, no tensor at all.
        return None


def _wide_sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dtype=torch.float32) if tensor.dtype in _SUMMED_WIDER else tensor.sum()


def value_facts(tensor: Tensor) -> ValueFacts:
    """Exact counts of NaN and infinities, and the largest finite magnitude."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if not can_hold_nonfinite(tensor) or tensor.numel() == 0 or unreadable_kind(tensor):
        return ValueFacts(shape, dtype)
    values = _plain(tensor)
    finite = torch.isfinite(values)
    kept = values[finite]
    return ValueFacts(
        shape,
        dtype,
        num_nan=int(torch.isnan(values).sum()),
        num_posinf=int(torch.isposinf(values).sum()),
        num_neginf=int(torch.isneginf(values).sum()),
        abs_max=float(kept.abs().max()) if kept.numel() else None,
    )


def first_nonfinite(tensor: Tensor) -> tuple[int, ...]:
    """Index of the first non-finite element in memory order of a contiguous copy; empty if there is none.

    For a sparse tensor in coordinates it is the index among the stored values.
    """
    bad = (~torch.isfinite(_elements(tensor))).nonzero()
    return tuple(int(position) for position in bad[0]) if len(bad) else ()


def tally(named: Iterable[tuple[str, Tensor]]) -> Tally:
    """How many of the tensors, and of their elements, are non-finite."""
    tensors = num_tensors = elements = num_elements = 0
    first = ""
    for name, tensor in named:
        num_tensors += 1
        num_elements += tensor.numel()
        if not is_finite(tensor):
            tensors += 1
            elements += value_facts(tensor).num_nonfinite
            first = first or name
    return Tally(tensors, num_tensors, elements, num_elements, first)
