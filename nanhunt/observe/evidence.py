"""What the first offender's inputs held at the elements where it went wrong, as plain numbers for the rules."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt.numerics import LIMITS, ulp
from nanhunt.observe.backward_evidence import gather_backward, with_backward
from nanhunt.observe.call import Call
from nanhunt.observe.finite import is_finite, unreadable_kind, value_facts
from nanhunt.observe.op_info import FocusedOp, tensors_in
from nanhunt.observe.producers import producers
from nanhunt.observe.recomputed import recomputed
from nanhunt.observe.saved import saved
from nanhunt.observe.singular import singular_matrices
from nanhunt.observe.values import as_float, values_at
from nanhunt.records.evidence import OffenderEvidence, Operand, Spectrum
from nanhunt.records.ops import OpRecord

MAX_POSITIONS = 8
"""Offending elements described one by one."""

MAX_LENGTHS = 4096
"""Whole numbers kept of a list of them."""

# Position of the spectrum and of the vectors among the outputs of each decomposition.
_DECOMPOSITIONS = {"aten::_linalg_eigh": (0, 1), "aten::_linalg_svd": (1, 0), "aten::linalg_eig": (0, 1)}

# The names under which autograd saves those two outputs, in the order of the operation's outputs.
_SAVED = {
    "aten::_linalg_eigh": ("eigenvalues", "eigenvectors"),
    "aten::_linalg_svd": ("U", "S"),
    "aten::linalg_eig": ("eigenvalues", "eigenvectors"),
}


def gather_evidence(offender: FocusedOp, forward: FocusedOp | None) -> OffenderEvidence | None:
    """Describes the offending elements of an operation that was run under focus.

    Args:
        offender: The operation whose output is non-finite.
        forward: For a backward operation, the forward operation it differentiates.

    Returns:
        None if no output is non-finite, as when the operation writes in place and its result was not kept.
    """
    offender = _single(offender)
    readable = [output for output in offender.outputs if output.layout is torch.strided]
    at = next((output for output in readable if unreadable_kind(output) is None and not is_finite(output)), None)
    if at is None:
        return None
    bad = at
    if bad.element_size() == 1:
        bad = bad.to(torch.float32)
    number = next(number for number, output in enumerate(offender.outputs) if output is at)
    values = _values(offender)
    mask = ~torch.isfinite(bad)
    positions = mask.nonzero()
    shown = [tuple(int(i) for i in position) for position in positions[:MAX_POSITIONS]]
    return OffenderEvidence(
        num_offending=int(mask.sum()),
        positions=tuple(shown),
        results=tuple(as_float(bad[position]) for position in shown),
        operands=tuple(_operands(offender.op, values, shown, tuple(bad.shape))),
        spectrum=_spectrum(forward, mask) if forward is not None else None,
        rows_all_neginf=_rows_all_neginf(offender, values),
        backward=gather_backward(offender, forward),
        exact=recomputed(offender, number, shown),
        singular=singular_matrices(offender),
        lengths=tuple((name, _whole(value)) for name, value in values.items() if _whole(value)),
    )


def evidence_at_birth(call: Call, output: Any, record: OpRecord, node: Any) -> OffenderEvidence | None:
    """Describes the offending elements of an operation that has just run.

    What it wrote over cannot be described any more.

    Args:
        call: The operation with its arguments.
        output: Its result.
        record: Its record.
        node: The autograd node that ran it, or None.
    """
    gone = {id(tensor) for tensor in call.written}
    args = tuple(_without(value, gone) for value in call.args)
    kwargs = {name: _without(value, gone) for name, value in call.kwargs.items()}
    outputs = (*call.written, *(tensor for tensor in tensors_in(output) if id(tensor) not in gone))
    kept = FocusedOp(record.op, call.traits.argument_names, args, kwargs, outputs)
    return with_backward(gather_evidence(kept, _saved_decomposition(record.forward_op, node)), kept, record, node)


def _saved_decomposition(forward_op: str | None, node: Any) -> FocusedOp | None:
    """The results of a decomposition that autograd saved for its backward pass."""
    names = _SAVED.get(forward_op or "")
    found = [saved(node, name) for name in names or ()]
    if not found or any(value is None for value in found):
        return None
    return FocusedOp(forward_op or "", (), (), {}, tuple(value.detach() for value in found))


def _without(value: Any, gone: set[int]) -> Any:
    if isinstance(value, list | tuple):
        return [None if id(part) in gone else part for part in value]
    return None if id(value) in gone else value


def _single(op: FocusedOp) -> FocusedOp:
    """Of an operation on lists, what it did to the first tensor that went non-finite."""
    if not op.op.startswith("aten::_foreach_") or not op.outputs:
        return op
    at = next((number for number, output in enumerate(op.outputs) if not is_finite(output)), 0)

    def part(value: Any) -> Any:
        return value[at] if isinstance(value, list | tuple) and len(value) == len(op.outputs) else value

    args, kwargs = tuple(map(part, op.args)), {name: part(value) for name, value in op.kwargs.items()}
    return FocusedOp(op.op.replace("_foreach_", ""), op.schema_names, args, kwargs, (op.outputs[at],))


def _values(op: FocusedOp) -> dict[str, Any]:
    """The arguments by their names in the schema."""
    return dict(zip(op.schema_names, op.args, strict=False)) | op.kwargs


def _whole(value: Any) -> tuple[int, ...]:
    """A list of whole numbers, where it is one that is not long."""
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= MAX_LENGTHS
    return tuple(value) if is_list and all(type(number) is int for number in value) else ()


def _operands(
    op: str, values: dict[str, Any], positions: list[tuple[int, ...]], shape: tuple[int, ...]
) -> Iterator[Operand]:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and unreadable_kind(value) is None:
            held = _values_at(value, positions, shape, is_per_channel="batch_norm" in op)
            is_at_edge = bool(held) and (abs(held[0]) in (0.0, 1.0) or ("sqrt" in op and held[0] < 0.0))
            made_by = producers(value, positions[0], shape) if is_at_edge else ()
            yield Operand(name, value_facts(value), held, made_by)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield Operand(name, None, (float(value),))


def _values_at(
    value: Tensor, positions: list[tuple[int, ...]], shape: tuple[int, ...], *, is_per_channel: bool
) -> tuple[float, ...]:
    """Values at the offending positions of the output, where the shape broadcasts to it."""
    if is_per_channel and value.dim() == 1 and len(shape) > 1:
        return tuple(as_float(value[position[1]]) for position in positions)
    return values_at(value, positions, shape)


def _spectrum(forward: FocusedOp, mask: Tensor) -> Spectrum | None:
    """The spectrum of the worst matrix, and how many of its batch are tied."""
    if forward.op not in _DECOMPOSITIONS or len(forward.outputs) < 2:
        return None
    at_values, at_vectors = _DECOMPOSITIONS[forward.op]
    values, vectors = forward.outputs[at_values], forward.outputs[at_vectors]
    if values.is_complex() or values.shape[-1] < 2:
        return None
    flat, flat_vectors = values.reshape(-1, values.shape[-1]), vectors.reshape(-1, *vectors.shape[-2:])
    gaps = flat.sort(dim=-1).values.diff(dim=-1)
    smallest = gaps.min(dim=-1).values
    matrix = _first_matrix(mask, len(flat), smallest)
    row = [float(value) for value in flat[matrix]]
    tied = _tied_groups(row)
    dtype = str(values.dtype).removeprefix("torch.")
    return Spectrum(
        matrix_index=matrix,
        matrix_position=tuple(int(i) for i in torch.unravel_index(torch.tensor(matrix), values.shape[:-1])),
        num_matrices=len(flat),
        num_tied=int((smallest == 0).sum()),
        values=tuple(row),
        tied=tied,
        min_gap=float(smallest[matrix]),
        median_min_gap=float(smallest.median()),
        rows=_carrying_rows(flat_vectors[matrix], tied[0]) if tied else (),
        eps=ulp(row[tied[0][0]], dtype) if tied and dtype in LIMITS else 0.0,
    )


def _first_matrix(mask: Tensor, num_matrices: int, smallest: Tensor) -> int:
    """The first matrix of the batch with an offending element; the smallest gap decides where shapes do not tell."""
    if mask.dim() >= 2 and mask.numel() // (mask.shape[-1] * mask.shape[-2]) == num_matrices:
        per_matrix = mask.reshape(num_matrices, -1).any(dim=-1)
        if bool(per_matrix.any()):
            return int(per_matrix.nonzero()[0])
    return int(smallest.argmin())


def _tied_groups(values: list[float]) -> tuple[tuple[int, ...], ...]:
    """Groups of positions with exactly the same value."""
    groups: dict[float, list[int]] = {}
    for position, value in enumerate(values):
        groups.setdefault(value, []).append(position)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _carrying_rows(vectors: Tensor, columns: tuple[int, ...]) -> tuple[int, ...]:
    """Rows with more than an even share of the tied vectors' weight, the heaviest first.

    Vectors of a tied pair are only defined up to a rotation; the sum of their squares in a row is not affected by it.
    """
    weight = vectors[:, list(columns)].abs().square().sum(dim=-1)
    share = float(weight.sum()) / len(weight)
    order = weight.argsort(descending=True)
    return tuple(int(row) for row in order if float(weight[row]) > share)


def _rows_all_neginf(op: FocusedOp, values: dict[str, Any]) -> int | None:
    """For softmax-like operations, the rows of the input that are -inf throughout.

    One written by hand subtracts the largest value of each row, which is -inf as well then.
    """
    first = op.args[0] if op.args else None
    mask = next((values[name] for name in ("mask", "attn_mask") if isinstance(values.get(name), Tensor)), None)
    if mask is not None and any(word in op.op for word in ("attention", "encoder_layer", "masked_softmax")):
        hidden = mask if mask.dtype == torch.bool else torch.isneginf(mask)
        return int(hidden.all(dim=-1).sum())
    if not isinstance(first, Tensor) or first.dim() == 0:
        return None
    if "softmax" in op.op or "logsumexp" in op.op:
        dims = values.get("dim", values.get("dims", -1))
        return int(torch.isneginf(first).all(dim=dims).sum())
    other = values.get("other")
    if op.op != "aten::sub" or not isinstance(other, Tensor) or other.dim() != first.dim():
        return None
    dims = [axis for axis in range(first.dim()) if other.shape[axis] == 1 < first.shape[axis]]
    rows = torch.isneginf(first).all(dim=dims, keepdim=True) & torch.isneginf(other) if dims else None
    return int(rows.sum()) if rows is not None else None
