"""root-gradient-at-zero: the gradient of a square root was taken at zero.

What it does:
    Looks at the divisor in the backward pass of ``sqrt``, which is twice its result, and of ``hypot``, which is its
    result. The rule holds only if it is 0 at the offending elements.

Why it matters:
    The slope of the root at 0 is infinite; times a zero that comes from further up it is NaN. The forward pass is fine.

Example:
    ``(x ** 2).sum().sqrt()`` at ``x = 0``

Use instead:
    ``torch.linalg.vector_norm``, whose gradient at 0 is 0, or a small constant inside the root, one that is not 0 in
    its type: in float16, 1e-8 is. A clamp after the root comes too late.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import lost_in_half, zero_notes
from nanhunt.rules.registry import Case, Judgement, Rule

_DIVISIONS = ("aten::div", "aten::div_")
_ROOTS = ("aten::sqrt", "aten::sqrt_", "aten::hypot", "aten::hypot_")


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.forward_op not in _ROOTS or case.op.op not in _DIVISIONS:
        return None
    divisor = case.operand("other")
    if divisor is None or not divisor.at_offenders or any(value != 0.0 for value in divisor.at_offenders):
        return None
    assert case.evidence is not None
    number, where = case.evidence.num_offending, list(case.evidence.positions[0])
    name = case.op.forward_op.removeprefix("aten::").removesuffix("_")
    return Judgement(
        f"gradient of {name} at 0 for {count(number, 'element')}, first at {where}",
        evidence={"num_offending": number, "first_position": where},
        notes=(*zero_notes(case), *lost_in_half(case)),
        help=("put a small constant inside the root, one that is not 0 in its type, or use torch.linalg.vector_norm",),
    )


RULE = Rule("NH202", "root-gradient-at-zero", "root-gradient-at-zero", _judge)

_BACKWARD = OpRecord(
    *(9, "aten::div", "birth", "backward", "", None),
    forward_op="aten::sqrt",
    outputs=(ValueFacts((2,), "float32", num_posinf=1),),
)


def _at(value: float) -> Case:
    return Case(_BACKWARD, OffenderEvidence(1, ((0,),), (float("inf"),), (Operand("other", None, (value,)),)))


FLAGGED = (_at(0.0),)
CLEAN = (_at(1e-30),)
