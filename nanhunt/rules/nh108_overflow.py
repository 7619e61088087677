"""overflow: finite numbers were multiplied, added or divided to one that its type cannot hold.

What it does:
    Holds where the same operation on the same inputs, in float64, gives more than the largest number of the result's
    type at every offending element; or where a sum would fit but its terms do not. Where it cannot be run again, it
    holds for operations that make an infinity of finite numbers in no other way, such as a product.

Why it matters:
    The next difference or quotient of two infinities is NaN, and then all of the model is.

Example:
    ``torch.tensor(1e30) * 1e30``

Use instead:
    Find what made the operands so large: a learning rate, a recurrence, an input without a scale.

Known limits:
    float16 and float8, where float32 would hold the result, are ``half-precision-overflow``; exponentials are
    ``exp-overflow``, other conversions ``cast-overflow``.
"""

import math

from nanhunt.records.evidence import Exact, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import base_name, describe_overflow, factors, numbers, overflow_of
from nanhunt.rules.registry import Case, Judgement, Rule

_CONVERSIONS = ("_to_copy", "copy")


def _judge(case: Case) -> Judgement | None:
    found = overflow_of(case)
    if found is None or base_name(case) in _CONVERSIONS:
        return None
    return Judgement(
        describe_overflow(case, found),
        evidence=numbers(case, reached=found.reached, limit=found.limit),
        notes=factors(case),
        help=("look at what made the operands so large; a bound at this place comes too late for the gradient",),
    )


RULE = Rule("NH108", "overflow", "overflow", _judge)


def _product(left: float, right: float, *, op: str = "aten::mul", exact: bool = True, result: float = math.inf) -> Case:
    facts = ValueFacts((4,), "float32", num_posinf=1)
    record = OpRecord(3, op, "birth", "forward", "head", None, outputs=(facts,))
    operands = tuple(
        Operand(name, ValueFacts((4,), "float32", num_posinf=int(value == math.inf), abs_max=abs(value)), (value,))
        for name, value in (("self", left), ("other", right))
    )
    again = (Exact(left / right if op == "aten::div" and right else left * right if right else math.inf),)
    return Case(record, OffenderEvidence(1, ((2,),), (result,), operands, exact=again if exact else ()))


FLAGGED = (_product(1e30, 1e30), _product(1e30, 1e-30, op="aten::div"), _product(1e30, 1e30, exact=False))
CLEAN = (
    _product(1.0, 0.0, op="aten::div"),
    _product(1e3, 1e3, op="aten::tan"),
    _product(math.inf, 2.0),
    _product(1e30, 1e30, op="mine::product", exact=False),
)
