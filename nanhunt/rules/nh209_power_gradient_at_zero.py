"""power-gradient-at-zero: the gradient of a power with an exponent below 1 was taken at zero.

What it does:
    Looks at the power in the backward pass of ``x ** p``, which is x to the p - 1. The rule holds only if at the
    offending elements x is 0 and that exponent is negative.

Why it matters:
    The slope of ``x ** 0.5`` at 0 is infinite, as is that of every power below 1: companding, Box-Cox, generalised
    means. The forward pass is 0 there, and fine. In a second derivative, powers below 2 are enough.

Example:
    ``torch.zeros(3, requires_grad=True).pow(0.5).sum().backward()``

Use instead:
    ``(x + eps) ** p`` with an eps that is not lost in the type. A clamp after the power comes too late.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import all_equal, lost_in_half, of_torch, zero_notes
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.name != "pow" or found.function != "pow":
        return None
    exponents = found.held.at("exponent")
    if not all_equal(found.held.at("self"), 0.0) or not exponents or any(value >= 0 for value in exponents):
        return None
    assert case.evidence is not None
    number, where, exponent = case.evidence.num_offending, list(found.held.positions[0]), exponents[0] + 1
    return Judgement(
        f"gradient of x ** {exponent:.6g} at 0 for {count(number, 'element')}, first at {where}",
        evidence={"num_offending": number, "first_position": where, "exponent": exponent},
        notes=(*zero_notes(case), *lost_in_half(case)),
        help=("put a small constant inside the power, one that is not 0 in the type of x",),
    )


RULE = Rule("NH209", "power-gradient-at-zero", "power-gradient-at-zero", _judge)

_POW = OpRecord(
    *(9, "aten::pow", "birth", "backward", "", None),
    forward_op="aten::pow",
    outputs=(ValueFacts((2,), "float32", num_posinf=1),),
)


def _at(value: float, exponent: float) -> Case:
    inputs = (Operand("self", None, (value,)), Operand("exponent", None, (exponent,)))
    held = BackwardEvidence(((0,),), (float("inf"),), inputs)
    return Case(_POW, OffenderEvidence(1, ((0,),), (float("inf"),), inputs, backward=held))


FLAGGED = (_at(0.0, -0.5), _at(0.0, -1.0))
CLEAN = (_at(1e-30, -1.5), _at(0.0, 0.5), Case(_POW, None))
