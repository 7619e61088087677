"""out-of-domain: a function was asked for a value where it has none.

What it does:
    Looks at the argument of ``acos``, ``asin``, ``acosh``, ``atanh``, ``erfinv``, ``logit``, ``xlogy``, ``lgamma`` and
    ``digamma``, and of a power with a fractional exponent, at the offending elements. The rule holds only if all of
    them lie outside the domain or on an edge where the function is infinite.

Why it matters:
    Rounding is enough: the cosine of an angle computed from two unit vectors can be 1.0000001.

Example:
    ``torch.acos(torch.tensor(1.0000001))``

Use instead:
    A form without an edge: ``atan2`` of sine and cosine for an angle, the logits for ``logit``, the absolute value
    and the sign for a power.

Known limits:
    Logarithms and roots have their own rules.
"""

import math
from collections.abc import Callable

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    at_first,
    base_name,
    digits_apart,
    has_nan_input,
    is_written_by_user,
    numbers,
    quoted,
    values_of,
)
from nanhunt.rules.registry import Case, Judgement, Rule

# Whether the function has no finite value there, and the domain in words.
_DOMAINS: dict[str, tuple[Callable[[float], bool], str]] = {
    "acos": (lambda x: abs(x) > 1, "from -1 to 1"),
    "asin": (lambda x: abs(x) > 1, "from -1 to 1"),
    "acosh": (lambda x: x < 1, "from 1"),
    "atanh": (lambda x: abs(x) >= 1, "between -1 and 1"),
    "erfinv": (lambda x: abs(x) >= 1, "between -1 and 1"),
    "logit": (lambda x: x <= 0 or x >= 1, "between 0 and 1"),
    "lgamma": (lambda x: x <= 0 and x == math.floor(x), "all numbers but 0, -1, -2, ..."),
    "digamma": (lambda x: x <= 0 and x == math.floor(x), "all numbers but 0, -1, -2, ..."),
    "xlogy": (lambda x: x <= 0, "above 0"),
}


def _judge(case: Case) -> Judgement | None:
    name = base_name(case)
    if not is_written_by_user(case) or has_nan_input(case):
        return None
    if name == "pow":
        return _judge_power(case)
    arguments = values_of(case, "other" if name == "xlogy" else "self")
    if name not in _DOMAINS or not arguments or not all(_DOMAINS[name][0](value) for value in arguments):
        return None
    return Judgement(
        f"{name} of {quoted(case, arguments, digits=_digits(arguments))}; its domain is {_DOMAINS[name][1]}",
        evidence=numbers(case, first_argument=arguments[0]),
        help=("write the argument so that it cannot get there; a clamp at the edge leaves an infinite gradient",),
    )


def _judge_power(case: Case) -> Judgement | None:
    bases, exponents = values_of(case, "self"), values_of(case, "exponent")
    if not bases or len(bases) != len(exponents):
        return None
    pairs = list(zip(bases, exponents, strict=True))
    if not all(base < 0 and exponent != math.floor(exponent) for base, exponent in pairs):
        return None
    base, exponent = pairs[0]
    return Judgement(
        f"{base:.6g} to the power of {exponent:.6g} {at_first(case, pairs)}; a negative number has no such power",
        evidence=numbers(case, base=base, exponent=exponent),
        help=("take the power of the absolute value and put the sign back, or keep the base from being negative",),
    )


def _digits(values: tuple[float, ...]) -> int:
    """As many digits as it takes to see which of them are not on the edge."""
    return max(digits_apart(value, math.copysign(1.0, value)) if abs(value) != 1 else 6 for value in values)


RULE = Rule("NH111", "out-of-domain", "out-of-domain", _judge)


def _given(op: str, value: float, exponent: float | None = None) -> Case:
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(ValueFacts((4,), "float32", num_nan=1),))
    operands = [Operand("self", ValueFacts((4,), "float32", abs_max=abs(value)), (value,))]
    if exponent is not None:
        operands.append(Operand("exponent", None, (exponent,)))
    return Case(record, OffenderEvidence(1, ((2,),), (math.nan,), tuple(operands)))


FLAGGED = (_given("aten::acos", 1.0000001192092896), _given("aten::logit", 0.0), _given("aten::pow", -1.5, -0.5))
CLEAN = (_given("aten::acos", 1.0), _given("aten::pow", -1.5, 2.0), _given("aten::pow", 0.0, -0.5))
