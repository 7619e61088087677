"""masked-entry-in-loss: the loss is infinite because it counts an entry that a mask has set to -inf.

What it does:
    Looks at an infinite loss without NaN of which the only infinity is a mask: -inf that ``masked_fill``, ``where`` or
    a sum put there on purpose. Where the operation that picks one entry of each row is known, such as the loss of a
    classification, the rule names it; else the mask itself.

Why it matters:
    Masking a class says that it cannot be the answer, and its log-probability is -inf. A label, an action or a path
    that is masked all the same has the probability 0, and the loss of its batch is infinite.

Example:
    ``F.cross_entropy(logits.masked_fill(banned, -torch.inf), labels)`` with a label that is banned

Use instead:
    A check that no label lies on a masked class; samples where one does left out of the loss.

Known limits:
    Which label it is, is told only where the loss is one operation.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, Sink, Trace, ValueFacts
from nanhunt.rules.offender import base_name, has_nan_input, numbers, where_infinity_came_from
from nanhunt.rules.registry import Case, Judgement, Rule

_LOSSES = ("nll_loss_forward", "nll_loss2d_forward")
_MASKS = ("masked_fill", "where", "index_fill", "add", "sub", "masked_scatter", "constant_pad_nd")

_HELP = ("check that no label lies on a masked class, and leave samples where one does out of the loss",)


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.phase != "forward":
        return None
    return _judge_mask(case) if case.op.deliberate else _judge_loss(case)


def _judge_loss(case: Case) -> Judgement | None:
    """An operation that picked -inf out of a mask that it was given."""
    given = case.operand("self")
    if case.op is None or case.evidence is None or given is None or given.facts is None or has_nan_input(case):
        return None
    is_picked = bool(case.evidence.results) and all(math.isinf(result) for result in case.evidence.results)
    if base_name(case) not in _LOSSES or not is_picked or not given.facts.num_neginf or given.facts.num_posinf:
        return None
    return Judgement(
        f"{case.op.op} picked an entry that is -inf: a label lies on a masked class",
        evidence=numbers(case, num_masked=given.facts.num_neginf),
        notes=where_infinity_came_from(case),
        help=_HELP,
    )


def _judge_mask(case: Case) -> Judgement | None:
    """A mask that nothing turned into NaN, and that the loss is infinite of."""
    assert case.op is not None
    index = case.op.index
    losses = [sink for sink in case.trace.sinks if sink.kind == "loss"]
    if base_name(case) not in _MASKS or not losses or any(sink.births != (index,) for sink in losses):
        return None
    if any(sink.facts.num_nan or not sink.facts.num_nonfinite for sink in losses):
        return None
    value = "inf" if losses[0].facts.num_posinf else "-inf"
    return Judgement(
        f"the loss is {value}, of nothing but the number that {case.op.op} put there",
        evidence={"num_infinite": losses[0].facts.num_nonfinite},
        notes=("the loss counts an entry that was masked, as that of a label on a masked class does",),
        help=_HELP,
    )


RULE = Rule("NH120", "masked-entry-in-loss", "masked-entry-in-loss", _judge, goes_before=("NH117",))

_FILL = OpRecord(5, "aten::masked_fill", "birth", "forward", "", None, deliberate=True)


def _masked(*births: int, op: OpRecord = _FILL, **loss: int) -> Case:
    return Case(op, trace=Trace(9, (op,), sinks=(Sink("loss", "loss", ValueFacts((), "float32", **loss), births),)))


def _picked(num_neginf: int, result: float = math.inf) -> Case:
    output = ValueFacts((), "float32", num_posinf=1)
    record = OpRecord(7, "aten::nll_loss_forward", "birth", "forward", "", None, outputs=(output,), ingredients=(5,))
    operands = (Operand("self", ValueFacts((3, 5), "float32", num_neginf=num_neginf, abs_max=4.0)),)
    return Case(record, OffenderEvidence(1, ((),), (result,), operands), Trace(9, (_FILL, record)))


_FULL = OpRecord(5, "aten::full", "birth", "forward", "", None, deliberate=True)
FLAGGED = (_masked(5, num_posinf=1), _picked(3))
CLEAN = (
    _masked(5, num_nan=1),
    _masked(5, 8, num_posinf=1),
    _masked(5, num_posinf=1, op=_FULL),
    _picked(0),
    _picked(3, math.nan),
)
