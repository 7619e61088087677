"""non-finite-custom-backward: the backward of an autograd.Function of your own made NaN or infinity of finite numbers.

What it does:
    Holds where the operation stands in the ``backward`` of an ``autograd.Function`` that torch did not write, none of
    its inputs explains the result, and no rule knows more.

Why it matters:
    Nothing checks a gradient that is written by hand; ``torch.autograd.gradcheck`` does, for the inputs it is given.

Use instead:
    ``torch.autograd.gradcheck`` in float64 at the edges of the domain: zeros, equal entries, empty masks.
"""

from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe, origin
from nanhunt.rules.nh501_log_of_nonpositive import RULE as LOG_OF_NONPOSITIVE
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    op = case.op
    if op is None or op.phase != "backward" or op.own_backward is None or not op.outputs:
        return None
    if LOG_OF_NONPOSITIVE.judge(case) is not None:
        # It says why, and its code is a later one.
        return None
    facts, of = op.outputs[0], op.forward_op or "a function of your own"
    return Judgement(
        f"{op.op} in the backward of {of} gave {describe(facts)} from {origin(op)}",
        evidence={"num_nonfinite": facts.num_nonfinite, "num_elements": facts.num_elements},
        help=("try torch.autograd.gradcheck in float64 on inputs such as these",),
    )


RULE = Rule("NH228", "non-finite-custom-backward", "non-finite-custom-backward", _judge)

_FACTS = (ValueFacts((4,), "float32", num_nan=1),)
_OWN = SourceLine("model.py", 13, "return gradient.pow(0.5)")
FLAGGED = (
    Case(
        OpRecord(*(9, "aten::pow", "birth", "backward", "", None), forward_op="Keep", outputs=_FACTS, own_backward=_OWN)
    ),
)
CLEAN = (Case(OpRecord(9, "aten::pow", "birth", "backward", "", None, forward_op="aten::sqrt", outputs=_FACTS)),)
