"""power-of-zero: zero was raised to a negative power.

What it does:
    Looks at base and exponent of ``pow`` at the offending elements. The rule holds only if every base is 0 and every
    exponent negative.

Why it matters:
    0 to the power of -0.5 is 1 / 0. In a graph it is the degree of a node without neighbours; times the zeros of its
    row it is NaN.

Example:
    ``adjacency.sum(-1).pow(-0.5)`` with an isolated node

Use instead:
    A power of a number that cannot be 0, such as the degree with a self-loop; or ``where`` before the power, so that
    neither value nor gradient of the zero is taken.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import at_first, base_name, is_written_by_user, numbers, values_of
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    bases, exponents = values_of(case, "self"), values_of(case, "exponent")
    if base_name(case) != "pow" or not is_written_by_user(case) or not bases or len(bases) != len(exponents):
        return None
    if any(base != 0.0 for base in bases) or not all(exponent < 0.0 for exponent in exponents):
        return None
    return Judgement(
        f"0 to the power of {exponents[0]:.6g} {at_first(case, exponents)}",
        evidence=numbers(case, base=0.0, exponent=exponents[0]),
        help=("keep the base away from 0 where it is made, or leave its zeros out before the power",),
    )


RULE = Rule("NH112", "power-of-zero", "power-of-zero", _judge)


def _power(base: float, exponent: float) -> Case:
    record = OpRecord(
        3, "aten::pow", "birth", "forward", "", None, outputs=(ValueFacts((4,), "float32", num_posinf=1),)
    )
    operands = (Operand("self", ValueFacts((4,), "float32"), (base,)), Operand("exponent", None, (exponent,)))
    return Case(record, OffenderEvidence(1, ((2,),), (math.inf,), operands))


FLAGGED = (_power(0.0, -0.5), _power(-0.0, -2.0))
CLEAN = (_power(1e-30, -2.0), _power(0.0, 0.5), _power(-1.5, -0.5))
