"""non-finite-activation: a forward operation made NaN or infinity of inputs that had none, for a reason no rule knows.

What it does:
    Names the first operation of the forward pass whose non-finite output reached the loss.

Why it matters:
    Everything computed from it is lost; the loss says so, but not where it began.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.phase == "backward":
        return None
    if not case.op.outputs:
        return Judgement(f"{case.op.op} put a constant there that is not finite")
    facts = case.op.outputs[0]
    message = f"{case.op.op} gave {describe(facts)} from {origin(case.op)}"
    return Judgement(message, evidence={"num_nonfinite": facts.num_nonfinite, "num_elements": facts.num_elements})


def origin(op: OpRecord) -> str:
    """What went in; a birth may be NaN made of infinities, such as a -inf mask."""
    return "infinite inputs without NaN" if op.ingredients else "finite inputs"


def describe(facts: ValueFacts) -> str:
    """``2 NaN and 1 +inf among 361 elements``."""
    parts = [
        f"{number:,} {name}"
        for number, name in ((facts.num_nan, "NaN"), (facts.num_posinf, "+inf"), (facts.num_neginf, "-inf"))
        if number
    ]
    return f"{' and '.join(parts)} among {count(facts.num_elements, 'element')}"


RULE = Rule("NH101", "non-finite-activation", "unknown", _judge)

_EXP = OpRecord(3, "aten::exp", "birth", "forward", "head", None, outputs=(ValueFacts((4,), "float32", num_posinf=1),))
_BACKWARD = OpRecord(9, "aten::mul", "birth", "backward", "", None, outputs=(ValueFacts((4,), "float32", num_nan=1),))
FLAGGED = (Case(_EXP, OffenderEvidence(1, ((0,),), (float("inf"),))),)
CLEAN = (Case(_BACKWARD),)
