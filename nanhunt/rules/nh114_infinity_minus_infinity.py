"""infinity-minus-infinity: NaN was made of two infinities of opposite sign.

What it does:
    Holds where a sum, a difference or a deviation from a mean made NaN of inputs without NaN but with infinities,
    which it does of two opposite infinities alone; in a product of matrices, where infinite terms meet in every NaN.

Why it matters:
    -inf is a fine mask as long as nobody takes a difference of two masked values.

Example:
    ``scores.amax(-1) - scores.amin(-1)`` of a row that is -inf throughout

Use instead:
    Leave masked entries out of the difference, or put a number in their place first with ``where``.
"""

import math

from nanhunt.records.evidence import Exact, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    at_nan,
    base_name,
    has_infinite_input,
    has_nan_input,
    is_written_by_user,
    numbers,
    where_infinity_came_from,
)
from nanhunt.rules.registry import Case, Judgement, Rule

# What is NaN of numbers and infinities only where two infinities of opposite sign meet.
_DIFFERENCES = ("add", "sub", "rsub", "sum", "mean", "cumsum", "var", "std", "var_mean", "native_layer_norm")
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax")


def _judge(case: Case) -> Judgement | None:
    if not is_written_by_user(case) or has_nan_input(case) or not has_infinite_input(case):
        return None
    assert case.op is not None
    num_nan = case.op.outputs[0].num_nan
    if not num_nan or not (base_name(case) in _DIFFERENCES or _is_softmax(case) or _is_in_sums(case)):
        return None
    return Judgement(
        f"{case.op.op} of infinity and infinity: {at_nan(case)}",
        evidence=numbers(case, num_nan=num_nan),
        notes=where_infinity_came_from(case),
        help=("leave the masked entries out, or replace them with where, before the difference is taken",),
    )


def _is_softmax(case: Case) -> bool:
    """Whether a softmax subtracted +inf, the largest value of its row, from itself."""
    operand = case.operand("self")
    rows = case.evidence.rows_all_neginf if case.evidence is not None else None
    has_posinf = operand is not None and operand.facts is not None and operand.facts.num_posinf > 0
    return base_name(case) in _SOFTMAX and has_posinf and not rows


def _is_in_sums(case: Case) -> bool:
    assert case.evidence is not None
    pairs = zip(case.evidence.exact, case.evidence.results, strict=False)
    in_sums = [one for one, result in pairs if math.isnan(result)]
    return bool(in_sums) and all(not one.num_zero_times_infinity and one.num_infinite > 1 for one in in_sums)


RULE = Rule("NH114", "infinity-minus-infinity", "infinity-minus-infinity", _judge)

_MASK = ValueFacts((4,), "float32", num_neginf=1)


def _difference(op: str, facts: ValueFacts, *terms: Exact) -> Case:
    output = ValueFacts((4,), "float32", num_nan=1)
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(output,), ingredients=(1,))
    operands = (Operand("self", facts, (-math.inf,)), Operand("other", facts, (-math.inf,)))
    return Case(record, OffenderEvidence(1, ((2,),), (math.nan,), operands, exact=terms))


FLAGGED = (
    _difference("aten::sub", _MASK),
    _difference("aten::mm", _MASK, Exact(math.nan, math.inf, 0, 2)),
    _difference("aten::_softmax", ValueFacts((4,), "float32", num_posinf=1)),
)
CLEAN = (
    _difference("aten::mul", _MASK),
    _difference("aten::sub", ValueFacts((4,), "float32", num_nan=1)),
    _difference("aten::mm", _MASK, Exact(math.nan, math.inf, 1, 2)),
)
