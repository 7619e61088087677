"""non-finite-gradient: a backward operation made NaN or infinity of finite inputs, for a reason no other rule knows.

What it does:
    Names the first operation of the backward pass whose non-finite output reached a parameter's gradient, and the
    forward operation it differentiates.

Why it matters:
    A finite loss says nothing about its gradient; one optimizer step later the weights are lost.
"""

from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe, origin
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.phase != "backward":
        return None
    if not case.op.outputs:
        return Judgement(f"{case.op.op} put a constant there that is not finite")
    facts = case.op.outputs[0]
    of = f", differentiating {case.op.forward_op}," if case.op.forward_op else ""
    message = f"{case.op.op}{of} gave {describe(facts)} from {origin(case.op)}"
    return Judgement(message, evidence={"num_nonfinite": facts.num_nonfinite, "num_elements": facts.num_elements})


RULE = Rule("NH201", "non-finite-gradient", "unknown", _judge)

_FACTS = (ValueFacts((4,), "float32", num_nan=1),)
FLAGGED = (Case(OpRecord(9, "aten::mul", "birth", "backward", "", None, forward_op="aten::sqrt", outputs=_FACTS)),)
CLEAN = (Case(OpRecord(3, "aten::exp", "birth", "forward", "", None, outputs=_FACTS)),)
