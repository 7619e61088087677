"""What a backward operation and the forward operation it belongs to held where it went wrong, as plain numbers.

NOTE on who cut the gradient off. Autograd frees what a node saved as soon as that node has run, so the mask of a
``where`` is gone when the branch it did not take is differentiated. The edges of the graph stay: the operations that
read a result are found from the roots that the engine was called with, and tell by their kind whether they leave
elements out.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nanhunt.numerics import LIMITS
from nanhunt.observe.finite import can_hold_nonfinite, is_finite, unreadable_kind, value_facts
from nanhunt.observe.op_info import FocusedOp
from nanhunt.observe.saved import saved
from nanhunt.observe.source import SKIPPED, is_users_function, kind_of, place_in_backward
from nanhunt.observe.values import as_float, values_at
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, StateSource, Trace

MAX_POSITIONS = 8
"""Offending elements described one by one."""

MAX_NODES = 20_000
"""Nodes of the graph looked at for one birth."""

MAX_ROWS = 512
"""Size up to which the singular values of a matrix are worked out."""

_ENGINE = "_engine_run_backward"

# Operations that take some elements and leave out others, whose gradient is then exactly 0; by their nodes' names. An
# activation that is 0 for some is not meant here: it guards nothing.
_CUTS = {
    **{name: name for name in ("where", "masked_fill", "masked_select", "masked_scatter", "gather", "clamp", "topk")},
    **{name: name for name in ("maximum", "minimum", "fmax", "fmin", "max", "min", "amax", "amin", "tril", "triu")},
    **{name: name for name in ("nan_to_num", "index_fill")},
    **dict.fromkeys(("index", "index_put", "index_select"), "indexing"),
    **dict.fromkeys(("clamp_min", "clamp_max"), "clamp"),
}
# Operations that pass every element's gradient on; through others, such as a product, it may become 0.
_PASSES = frozenset(
    ("add", "sub", "rsub", "neg", "view", "reshape", "unsafe_view", "reshape_alias", "t", "transpose", "permute")
) | frozenset(("expand", "squeeze", "unsqueeze", "sum", "mean", "to_copy", "clone", "alias", "cat", "stack"))

# What is not finite stays so in a product, and as a numerator.
_KEEPS_NONFINITE = ("mul", "div")

# Functions that are not finite at an edge: the operand that autograd saves, and its values there.
_POLES = {
    "div": ("other", (0.0,)),
    **dict.fromkeys(("log", "log2", "log10"), ("self", (0.0,))),
    "log1p": ("self", (-1.0,)),
    "atanh": ("self", (-1.0, 1.0)),
    "logit": ("self", (0.0, 1.0)),
}

# The results of operations that have several, as far as their backward passes use them.
_RESULTS = {
    "aten::linalg_inv_ex": ("inverse",),
    "aten::_linalg_solve_ex": ("result", "LU"),
    "aten::linalg_lu_factor_ex": ("LU",),
    "aten::linalg_cholesky_ex": ("L",),
    "aten::linalg_qr": ("Q", "R"),
    "aten::_linalg_svd": ("U", "S", "Vh"),
    "aten::linalg_eig": ("eigenvalues", "eigenvectors"),
}
_TRIANGLES = ("LU", "R", "L")


def gather_backward(offender: FocusedOp, forward: FocusedOp | None) -> BackwardEvidence | None:
    """Describes a backward operation that was run under focus, as was the forward operation it differentiates.

    Args:
        offender: The operation whose output is non-finite.
        forward: The forward operation; None for an operation of the forward pass.

    Returns:
        None also where it cannot be described.
    """
    if forward is None:
        return None
    held = dict(zip(forward.schema_names, forward.args, strict=False)) | forward.kwargs
    held |= zip(_RESULTS.get(forward.op, ("result",)), forward.outputs, strict=False)
    return _described(offender, forward.op, held)


def with_backward(
    found: OffenderEvidence | None, offender: FocusedOp, record: OpRecord, node: Any
) -> OffenderEvidence | None:
    """The evidence on an operation that has just run, with what its autograd node still holds.

    Args:
        found: The evidence on the operation alone.
        offender: The operation.
        record: Its record.
        node: The autograd node that ran it, or None.
    """
    if found is None or record.phase != "backward" or node is None:
        return found
    return replace(found, backward=_described(offender, record.forward_op or "", _saved(node), node))


def with_consequence(
    gathered: Mapping[int, OffenderEvidence], offender: OpRecord | StateSource, trace: Trace
) -> OffenderEvidence | None:
    """The evidence on an offender, with that on the first operation of the backward pass that its infinity spoilt.

    Args:
        gathered: The evidence on births, by index.
        offender: The first offender.
        trace: The whole trace.
    """
    found = gathered.get(offender.index) if isinstance(offender, OpRecord) else None
    if found is None or found.backward is not None:
        return found
    spoilt = (r.index for r in trace.ops if r.phase == "backward" and offender.index in r.ingredients)
    later = next((gathered[index].backward for index in spoilt if index in gathered), None)
    return replace(found, backward=later)


def _described(offender: FocusedOp, forward_op: str, held: dict[str, Any], node: Any = None) -> BackwardEvidence | None:
    try:
        return _gathered(offender, forward_op, held, node)
    except Exception:  # noqa: BLE001 - what is missing leaves a cause unknown; the traced program must not notice
        return None


def _gathered(offender: FocusedOp, forward_op: str, held: dict[str, Any], node: Any) -> BackwardEvidence | None:
    readable = [output for output in offender.outputs if output.layout is torch.strided]
    bad = next((output for output in readable if unreadable_kind(output) is None and not is_finite(output)), None)
    if bad is None:
        return None
    values = bad.detach()
    # Where NaN is among infinities it says more: a gradient of 0 met an infinite slope.
    mask = torch.isnan(values) if bool(torch.isnan(values).any()) else torch.isinf(values)
    positions = [tuple(position) for position in mask.nonzero()[:MAX_POSITIONS].tolist()]
    shape = tuple(bad.shape)
    arguments = dict(zip(offender.schema_names, offender.args, strict=False)) | offender.kwargs
    smallest, largest, place = _diagonal(forward_op, held, positions, shape)
    operands = tuple(_operands(held, positions, shape))
    return BackwardEvidence(
        positions=tuple(positions),
        made=tuple(as_float(values[position]) for position in positions),
        inputs=tuple(_operands(arguments, positions, shape)),
        operands=operands,
        cut_by=_cut_by(node, may_vanish=not _was_nonfinite(forward_op, operands)) if node is not None else "",
        is_in_hook=node is not None and _is_in_hook(node),
        smallest=smallest,
        largest=largest,
        smallest_at=place,
    )


def _saved(node: Any) -> dict[str, Any]:
    """What autograd saved for a node, by name; what it has freed already is left out."""
    held: dict[str, Any] = {}
    if node is not None and node.name().endswith("AccumulateGrad"):
        held["variable"] = node.variable
    for name in dir(node) if node is not None and getattr(node, "_forward_cls", None) is None else ():
        if name.startswith("_saved_"):
            try:
                held[name.removeprefix("_saved_")] = saved(node, name.removeprefix("_saved_"))
            except RuntimeError:
                continue
    return held


def _operands(values: dict[str, Any], positions: list[tuple[int, ...]], shape: tuple[int, ...]) -> Iterator[Operand]:
    for name, value in values.items():
        if isinstance(value, Tensor) and can_hold_nonfinite(value) and unreadable_kind(value) is None:
            if value.layout is torch.strided:
                yield Operand(name, value_facts(value), values_at(value.detach(), positions, shape))
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield Operand(name, None, (float(value),) * len(positions))


def _was_nonfinite(forward_op: str, operands: tuple[Operand, ...]) -> bool:
    """Whether the forward operation is known to have given NaN or infinity at the first position."""
    first = {operand.name: operand.at_offenders[0] for operand in operands if operand.at_offenders}
    name = forward_op.removeprefix("aten::").removesuffix("_")
    if name in _POLES:
        argument, edges = _POLES[name]
        return first.get(argument) in edges
    results = ("self", "other") if name == "mul" else ("result",)
    return any(not math.isfinite(first.get(result, 0.0)) for result in results)


def is_in_hook_of_activation(found: OffenderEvidence | None) -> bool:
    """Whether the hook of a tensor that is no parameter ran the operation."""
    held = found.backward if found is not None else None
    return held is not None and held.is_in_hook and not any(one.name == "variable" for one in held.operands)


def _is_in_hook(node: Any) -> bool:
    """Whether Python code of a gradient hook runs the operation, not a mode or a tensor class of the user's."""
    frame: Any = sys._getframe(1)
    if is_users_function(node) or place_in_backward(frame)[0] != "code":
        return False
    while frame.f_code.co_name != _ENGINE:
        if frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__") and kind_of(frame.f_code) != SKIPPED:
            return False
        frame = frame.f_back
    return True


# Who reads the result of the forward operation.


def _cut_by(node: Any, *, may_vanish: bool) -> str:
    """What leaves elements of the node's result out, on every way to the root; '' if that is not known.

    In a product the gradient of a finite result may vanish; a result that is not finite would spoil the product.
    """
    roots = engine_roots()
    readers = _readers(node, roots)
    found: list[str] = []
    waiting, seen = [node], {node}
    while waiting:
        read = waiting.pop()
        above = readers.get(read)
        if above is None or read in roots:
            # A root takes all elements.
            return ""
        for reader in above:
            name = _name(reader)
            if name in _CUTS:
                found.append(_CUTS[name])
            elif name not in _PASSES and (may_vanish or not _hands_on(reader, name, read)):
                return ""
            elif reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return found[0]


def _hands_on(reader: Any, name: str, read: Any) -> bool:
    return name in _KEEPS_NONFINITE and (name == "mul" or reader.next_functions[0][0] is read)


def _readers(node: Any, roots: list[Any]) -> dict[Any, list[Any]]:
    """For each node between the roots of the running backward pass and this one, the nodes that read its result."""
    readers: dict[Any, list[Any]] = {}
    number = node._sequence_nr()
    waiting, seen = list(roots), set(roots)
    while waiting and len(seen) <= MAX_NODES:
        reader = waiting.pop()
        for read, _ in reader.next_functions:
            # What is older than the node cannot lead to it.
            if read is None or (read is not node and read._sequence_nr() <= number):
                continue
            readers.setdefault(read, []).append(reader)
            if read not in seen:
                seen.add(read)
                waiting.append(read)
    return {} if waiting else readers


def engine_roots() -> list[Any]:
    """The nodes that the running engine was called with.

    On an accelerator the engine's operations run in threads of its own, while those who called it wait in theirs.
    """
    own = _engine_frame(sys._getframe(1))
    frames = [own] if own is not None else [_engine_frame(frame) for frame in sys._current_frames().values()]
    outputs = [output for frame in frames if frame is not None for output in frame.f_locals.get("t_outputs", ())]
    nodes = [output.grad_fn if isinstance(output, Tensor) else getattr(output, "node", None) for output in outputs]
    return [node for node in nodes if node is not None]


def _engine_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_name != _ENGINE:
        frame = frame.f_back
    return frame


def _name(node: Any) -> str:
    """``masked_fill`` for a ``MaskedFillBackward0``."""
    name = re.sub(r"Backward\d*$", "", node.name())
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


# Matrices that are singular, or nearly so.


def _diagonal(
    forward_op: str, held: dict[str, Any], positions: list[tuple[int, ...]], shape: tuple[int, ...]
) -> tuple[float | None, float | None, int | None]:
    """What the backward pass of a decomposition divides by: smallest and largest magnitude, place of the smallest."""
    if forward_op not in _RESULTS:
        return None, None, None
    for name in (*_RESULTS[forward_op], "eigenvalues"):
        value = held.get(name)
        if not isinstance(value, Tensor) or not is_finite(value):
            continue
        if name == "inverse":
            return _of_inverse(_one(value.detach(), positions, shape))
        if name in _TRIANGLES:
            diagonal = _one(value.detach(), positions, shape).diagonal().abs()
        elif name == "S":
            diagonal = _one(value.detach()[..., None], positions, shape)[:, 0]
        elif name == "eigenvalues":
            return _closest(_one(value.detach()[..., None], positions, shape)[:, 0])
        else:
            continue
        if not diagonal.numel():
            return None, None, None
        return float(diagonal.min()), float(diagonal.max()), int(diagonal.argmin())
    return None, None, None


def _one(matrices: Tensor, positions: list[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """The matrix of the batch in which the first offending element lies."""
    batch = matrices.shape[:-2]
    index = positions[0][: len(batch)] if shape[: len(batch)] == tuple(batch) else (0,) * len(batch)
    return matrices[index]


def _of_inverse(inverse: Tensor) -> tuple[float | None, float | None, int | None]:
    """The singular values of a matrix, from its inverse."""
    if len(inverse) > MAX_ROWS or str(inverse.dtype).removeprefix("torch.") not in LIMITS:
        return None, None, None
    values = torch.linalg.svdvals(inverse.double())
    return 1 / float(values[0]), 1 / float(values[-1]) if float(values[-1]) else None, None


def _closest(values: Tensor) -> tuple[float | None, float | None, int | None]:
    """Distance of the two closest eigenvalues, and the largest magnitude."""
    if not 1 < len(values) <= MAX_ROWS:
        return None, None, None
    gaps = (values[:, None] - values[None]).abs() + torch.eye(len(values), dtype=torch.float64).to(
        values.device
    ) * 1e300
    return float(gaps.min()), float(values.abs().max()), int(gaps.argmin()) // len(values)
