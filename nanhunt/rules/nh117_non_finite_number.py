"""non-finite-number: the program computed with a plain number that is NaN or infinite.

What it does:
    Looks at the plain numbers that the operation was given: a factor, a weight of a loss, a rate, a fill value. The
    rule holds where one of them is NaN, or where one is infinite and what came out is infinite; and where such a number
    was put into a tensor, as by ``full`` or ``masked_fill``, and nothing else went wrong on its way to the loss.

Why it matters:
    A number that was computed was made by numpy or by Python, where nothing was recorded of it: 1 / 0 in numpy is inf
    with a warning that most programs hide. One that was put there on purpose stands in the line, and was to be
    overwritten or left out before it does harm.

Example:
    ``loss * float(1 / counts[k])`` with ``counts`` an array that holds a 0

Use instead:
    A check where the number is made; for a tensor that is filled later, ``zeros`` or the values themselves.

Known limits:
    Where several constants are put in one place, which of them did the harm is not told.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import at_elements, base_name, numbers
from nanhunt.rules.registry import Case, Judgement, Rule

# Arguments that may well be infinite: which norm, and bounds.
_HARMLESS = ("ord", "p", "min", "max", "posinf", "neginf", "nan", "threshold")


def _judge(case: Case) -> Judgement | None:
    if case.op is None or (case.op.phase == "backward" and case.op.own_backward is None):
        return None
    if case.op.deliberate:
        return _judge_constant(case)
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


_HELP = ("look at where the number is made: it came as a plain number, of which nothing was recorded",)
_FILLS = ("full", "full_like", "new_full", "fill", "scalar_tensor", "lift_fresh")


def _judge_constant(case: Case) -> Judgement:
    assert case.op is not None
    if base_name(case) in _FILLS:
        note = "the line asks for that number; some of it was read before anything was written over it"
        help_ = "write to all of the tensor before it is read, or begin with a finite number"
    else:
        note = "the line asks for that number, and nothing after it left it out again"
        help_ = "leave these elements out before the loss, or put a finite number there"
    return Judgement(f"{case.op.op} put a number there that is not finite", notes=(note,), help=(help_,))


RULE = Rule("NH117", "non-finite-number", "non-finite-number", _judge)


def _times(value: float, *, result: float = math.inf, name: str = "other") -> Case:
    facts = ValueFacts((2,), "float32", num_nan=int(math.isnan(result)), num_posinf=int(math.isinf(result)))
    record = OpRecord(5, "aten::mul", "birth", "forward", "", None, outputs=(facts,))
    operands = (Operand("self", ValueFacts((2,), "float32"), (1.0,)), Operand(name, None, (value,)))
    return Case(record, OffenderEvidence(1, ((1,),), (result,), operands))


_FULL = OpRecord(5, "aten::full", "birth", "forward", "", None, deliberate=True)
FLAGGED = (_times(math.inf), _times(math.nan, result=math.nan), Case(_FULL))
CLEAN = (_times(2.0), _times(math.inf, result=math.nan), _times(math.inf, name="ord"))
