"""non-finite-number: the program computed with a plain number that is NaN or infinite.

What it does:
    Looks at the plain numbers that the operation was given: a factor, a weight of a loss, a rate, a fill value. The
    rule holds where one of them is NaN, or where one is infinite and what came out is infinite.

Why it matters:
    The number was made outside of torch, by numpy or by Python, where nothing was recorded of it: 1 / 0 in numpy is
    inf with a warning that most programs hide.

Example:
    ``loss * float(1 / counts[k])`` with ``counts`` an array that holds a 0

Use instead:
    A check where the number is made.

Known limits:
    Where several constants are put in one place, which of them did the harm is not told.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import at_elements, numbers
from nanhunt.rules.registry import Case, Judgement, Rule

# Arguments that may well be infinite: which norm, and bounds.
_HARMLESS = ("ord", "p", "min", "max", "posinf", "neginf", "nan", "threshold")


def _judge(case: Case) -> Judgement | None:
    if case.op is None or (case.op.phase == "backward" and case.op.own_backward is None):
        return None
    if case.op.deliberate:
        return Judgement(f"{case.op.op} put a number there that is not finite", help=_HELP)
    if case.evidence is None or not case.op.outputs:
        return None
    given = {one.name: one.at_offenders[0] for one in case.evidence.operands if one.facts is None and one.at_offenders}
    bad = {name: value for name, value in given.items() if not math.isfinite(value) and name not in _HARMLESS}
    if not bad or case.op.ingredients:
        return None
    if not any(math.isnan(value) for value in bad.values()) and case.op.outputs[0].num_nan:
        return None
    name, value = next(iter(bad.items()))
    return Judgement(
        f"{case.op.op} was given the number {value} as {name}, {at_elements(case)}",
        evidence=numbers(case, **{name: value}),
        help=_HELP,
    )


_HELP = ("look at where the number is made, outside of torch",)

RULE = Rule("NH117", "non-finite-number", "non-finite-number", _judge)


def _times(value: float, *, result: float = math.inf, name: str = "other") -> Case:
    facts = ValueFacts((2,), "float32", num_nan=int(math.isnan(result)), num_posinf=int(math.isinf(result)))
    record = OpRecord(5, "aten::mul", "birth", "forward", "", None, outputs=(facts,))
    operands = (Operand("self", ValueFacts((2,), "float32"), (1.0,)), Operand(name, None, (value,)))
    return Case(record, OffenderEvidence(1, ((1,),), (result,), operands))


_FULL = OpRecord(5, "aten::full", "birth", "forward", "", None, deliberate=True)
FLAGGED = (_times(math.inf), _times(math.nan, result=math.nan), Case(_FULL))
CLEAN = (_times(2.0), _times(math.inf, result=math.nan), _times(math.inf, name="ord"))
