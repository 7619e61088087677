"""root-of-negative: the square root of a negative number was taken.

What it does:
    Looks at the argument of ``sqrt`` and ``rsqrt`` at the offending elements, and at the variance that a batch norm
    of evaluation is given. The rule holds only if all of them are below 0.

Why it matters:
    The result is NaN. Most often the number is 0 up to rounding: a variance as a difference of squares, a distance as
    x² - 2xy + y².

Example:
    ``torch.sqrt(x.square().mean() - x.mean().square())`` of a constant ``x``

Use instead:
    A form that cannot become negative: ``var``, ``cdist``, the sum of squared differences.

Known limits:
    Of an operation in place the argument is gone; NaN out of numbers that are not NaN says that it was negative.
"""

import math
from dataclasses import replace

from nanhunt.numerics import LIMITS, ulp
from nanhunt.records.evidence import OffenderEvidence, Operand, Producer
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    WRITTEN_OVER,
    at_elements,
    base_name,
    has_nan_input,
    is_in_place,
    is_written_by_user,
    numbers,
    quoted,
    values_of,
)
from nanhunt.rules.registry import Case, Judgement, Rule

_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")


def _judge(case: Case) -> Judgement | None:
    name = base_name(case)
    if not is_written_by_user(case) or has_nan_input(case):
        return None
    assert case.evidence is not None
    if name in _NORMS:
        variances, eps = values_of(case, "running_var"), values_of(case, "eps")
        if not variances or not eps or any(value + eps[0] >= 0 for value in variances):
            return None
        message = f"a norm takes the root of a variance of {quoted(case, variances)}"
        help_ = ("look at what wrote the running variance: a variance is never negative",)
        return Judgement(message, numbers(case, lowest_variance=min(variances), eps=eps[0]), (), help_)
    if name not in ("sqrt", "rsqrt"):
        return None
    if is_in_place(case) and all(math.isnan(result) for result in case.evidence.results):
        return Judgement(f"{name} of a negative number {at_elements(case)}", numbers(case), (WRITTEN_OVER,), _HELP)
    arguments = values_of(case, "self")
    if not arguments or any(value >= 0 for value in arguments):
        return None
    message = f"{name} of {quoted(case, arguments)}"
    return Judgement(message, numbers(case, lowest_argument=min(arguments)), _rounding(case), _HELP)


_HELP = (
    "write what is under the root so that it cannot be negative: var or a sum of squared differences instead of a"
    " difference of squares; a clamp there cuts its gradient off",
)


def _rounding(case: Case) -> tuple[str, ...]:
    """Whether the negative numbers are small beside the largest one, or beside what they are a difference of."""
    operand = case.operand("self")
    if operand is None or operand.facts is None or operand.facts.dtype not in LIMITS:
        return ()
    dtype = operand.facts.dtype
    small = 100 * LIMITS[dtype].eps
    term = max(
        (abs(value) for one in operand.made_by[:1] for name, value, _ in one.numbers if name == "term"), default=0
    )
    if abs(operand.at_offenders[0]) <= small * term:
        step = ulp(term, dtype)
        return (f"at the first of them it is a difference of numbers near {term:.6g}, {step:.3g} apart in {dtype}",)
    largest, lowest = operand.facts.abs_max or 0.0, max(abs(value) for value in operand.at_offenders)
    if lowest > small * largest:
        return ()
    return (f"small beside the largest magnitude there, {largest:.6g}, as rounding errors are",)


RULE = Rule("NH110", "root-of-negative", "root-of-negative", _judge)


_DIFFERENCE = Producer("sub", "float32", (("term", 9e6, 9e6),), of=("mean", "pow"))


def _root_of(value: float, op: str = "aten::sqrt", result: float = math.nan) -> Case:
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(ValueFacts((4,), "float32", num_nan=1),))
    operands = () if op.endswith("_") else (Operand("self", ValueFacts((4,), "float32", abs_max=9e5), (value,)),)
    return Case(record, OffenderEvidence(1, ((2,),), (result,), operands))


_OF_SQUARES = replace(
    _root_of(-1.0),
    evidence=OffenderEvidence(
        *(1, ((2,),), (math.nan,)),
        (Operand("self", ValueFacts((4,), "float32", abs_max=1.0), (-1.0,), (_DIFFERENCE,)),),
    ),
)
FLAGGED = (_OF_SQUARES, _root_of(-0.03125), _root_of(-4.0, "aten::rsqrt"), _root_of(0.0, "aten::sqrt_"))
CLEAN = (_root_of(0.0, "aten::rsqrt", math.inf), _root_of(4.0), _root_of(-4.0, "aten::mul"))
