"""What the first offender's inputs held at the elements where it went wrong, as plain numbers for the rules."""

from typing import Any

import torch
from torch import Tensor

from nanhunt.numerics import LIMITS, ulp
from nanhunt.observe.call import Call
from nanhunt.observe.finite import can_hold_nonfinite, is_finite, unreadable_kind, value_facts
from nanhunt.observe.op_info import FocusedOp, tensors_in
from nanhunt.records.evidence import OffenderEvidence, Operand, Spectrum
from nanhunt.records.ops import OpRecord

MAX_POSITIONS = 8
"""Offending elements described one by one."""

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
    readable = [output for output in offender.outputs if output.layout is torch.strided]
    bad = next((output for output in readable if unreadable_kind(output) is None and not is_finite(output)), None)
    if bad is None:
        return None
    if bad.element_size() == 1:
        bad = bad.to(torch.float32)
    mask = ~torch.isfinite(bad)
    positions = mask.nonzero()
    shown = [tuple(int(i) for i in position) for position in positions[:MAX_POSITIONS]]
    return OffenderEvidence(
        num_offending=int(mask.sum()),
        positions=tuple(shown),
        results=tuple(_number(bad[position]) for position in shown),
        operands=tuple(_operands(offender, shown, tuple(bad.shape))),
        spectrum=_spectrum(forward, mask) if forward is not None else None,
        rows_all_neginf=_rows_all_neginf(offender),
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
    args = tuple(None if id(value) in gone else value for value in call.args)
    kwargs = {name: None if id(value) in gone else value for name, value in call.kwargs.items()}
    outputs = tuple(call.written or tensors_in(output))
    kept = FocusedOp(record.op, call.traits.argument_names, args, kwargs, outputs)
    return gather_evidence(kept, _saved_decomposition(record.forward_op, node))


def _saved_decomposition(forward_op: str | None, node: Any) -> FocusedOp | None:
    """The results of a decomposition that autograd saved for its backward pass."""
    names = _SAVED.get(forward_op or "")
    if names is None or not all(hasattr(node, f"_saved_{name}") for name in names):
        return None
    outputs = tuple(getattr(node, f"_saved_{name}").detach() for name in names)
    return FocusedOp(forward_op or "", (), (), {}, outputs)


def _operands(op: FocusedOp, positions: list[tuple[int, ...]], shape: tuple[int, ...]) -> list[Operand]:
    values = dict(zip(op.schema_names, op.args, strict=False)) | op.kwargs
    operands: list[Operand] = []
    for name, value in values.items():
        if isinstance(value, Tensor) and can_hold_nonfinite(value) and value.layout is torch.strided:
            operands.append(Operand(name, value_facts(value), _values_at(value, positions, shape)))
        elif isinstance(value, float | int) and not isinstance(value, bool):
            operands.append(Operand(name, None, (float(value),)))
    return operands


def _values_at(value: Tensor, positions: list[tuple[int, ...]], shape: tuple[int, ...]) -> tuple[float, ...]:
    """Values at the offending positions of the output, where the shape broadcasts to it."""
    try:
        wide = value.expand(shape)
    except RuntimeError:
        return ()
    return tuple(_number(wide[position]) for position in positions)


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


def _rows_all_neginf(op: FocusedOp) -> int | None:
    """For softmax-like operations, the rows of the input that are -inf throughout."""
    if "softmax" not in op.op and "logsumexp" not in op.op:
        return None
    value = op.args[0]
    dim = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], int) else -1
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    return int(torch.isneginf(value).all(dim=dim).sum())


def _number(value: Any) -> float:
    """A Python float; the magnitude of a complex number."""
    return float(value.abs()) if value.is_complex() else float(value)
