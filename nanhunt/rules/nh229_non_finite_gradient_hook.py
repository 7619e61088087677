"""non-finite-gradient-hook: a hook on a gradient made NaN or infinity of finite numbers.

What it does:
    Holds where the operation was run by Python code that autograd calls for a tensor, a parameter or a module during
    the backward pass, and says what it divided by where it divided by 0.

Why it matters:
    Hooks that rescale, standardise or clip gradients divide by what they measure; of a gradient that has vanished that
    is 0.

Example:
    ``h.register_hook(lambda gradient: gradient / gradient.abs().max())`` where the gradient is 0

Use instead:
    A floor under the divisor inside the hook: ``gradient / gradient.abs().max().clamp(min=1e-12)``.
"""

from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe, origin
from nanhunt.rules.nh208_untaken_branch_gradient import all_equal
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    op, held = case.op, case.evidence.backward if case.evidence else None
    if op is None or op.phase != "backward" or held is None or not held.is_in_hook or not op.outputs:
        return None
    divided = op.op in ("aten::div", "aten::div_") and all_equal(held.at("other"), 0.0)
    why = "a division by 0" if divided else origin(op)
    return Judgement(
        f"{op.op} in a gradient hook gave {describe(op.outputs[0])} from {why}",
        evidence={"num_nonfinite": op.outputs[0].num_nonfinite, "num_elements": op.outputs[0].num_elements},
        notes=("the hook is at the line named",) if op.source else (),
        help=("put a floor under what the hook divides by",) if divided else (),
    )


RULE = Rule("NH229", "non-finite-gradient-hook", "non-finite-gradient-hook", _judge)

_DIV = OpRecord(*(9, "aten::div", "birth", "backward", "", None), outputs=(ValueFacts((4,), "float32", num_nan=4),))


def _divided(*, is_in_hook: bool) -> Case:
    inputs = (Operand("self", None, (0.0,)), Operand("other", None, (0.0,)))
    held = BackwardEvidence(((0,),), (float("nan"),), inputs, is_in_hook=is_in_hook)
    return Case(_DIV, OffenderEvidence(4, ((0,),), (float("nan"),), inputs, backward=held))


FLAGGED = (_divided(is_in_hook=True),)
CLEAN = (_divided(is_in_hook=False), Case(_DIV, None))
