"""half-precision-overflow: a result is too large for float16 or float8, but not for float32.

What it does:
    Holds where the same operation on the same inputs, in float64, gives at every offending element more than the
    narrow type of the result can hold, 65504 in float16, and less than float32 can.

Why it matters:
    Nothing is wrong with the numbers: squares, sums and scores of a few hundred are ordinary, and only the type is
    too small for them.

Example:
    ``torch.full((1,), 300.0, dtype=torch.float16).square()``

Use instead:
    float32 or bfloat16 for this operation, or a scale before it instead of after it: ``(q / d**0.5) @ k``.

References:
    Micikevicius et al. 2018, "Mixed precision training", ICLR.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import Exact, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import NARROW, Overflow, describe_overflow, factors, numbers, overflow_of
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = overflow_of(case)
    if found is None or found.dtype not in NARROW or not _would_fit(case, found):
        return None
    return Judgement(
        describe_overflow(case, found),
        evidence=numbers(case, reached=found.reached, limit=found.limit),
        notes=(*factors(case), f"float32 ends at {LIMITS['float32'].max:.6g}"),
        help=("run this operation in float32 or bfloat16, or scale its inputs down before it",),
    )


def _would_fit(case: Case, found: Overflow) -> bool:
    """Whether float32 would hold it; products and sums of narrow numbers alone are far below its end."""
    if found.reached is not None:
        assert case.evidence is not None
        return all(max(abs(one.value), one.largest) <= LIMITS["float32"].max for one in case.evidence.exact)
    operands = case.evidence.operands if case.evidence is not None else ()
    return (
        case.op is not None
        and all(
            abs(one.at_offenders[0]) < 1e30 if one.facts is None else (one.facts.abs_max or 0.0) < 1e30
            for one in operands
        )
        and "prod" not in case.op.op
        and "pow" not in case.op.op
    )


RULE = Rule("NH404", "half-precision-overflow", "half-precision-overflow", _judge, goes_before=("NH108",))


def _square(value: float, dtype: str = "float16", *, exact: bool = True) -> Case:
    output = ValueFacts((4,), dtype, num_posinf=1)
    record = OpRecord(3, "aten::mul", "birth", "forward", "norm", None, outputs=(output,))
    operands = tuple(Operand(name, ValueFacts((4,), dtype, abs_max=value), (value,)) for name in ("self", "other"))
    again = (Exact(value * value),) if exact else ()
    return Case(record, OffenderEvidence(1, ((2,),), (math.inf,), operands, exact=again))


FLAGGED = (_square(300.0), _square(300.0, exact=False), _square(300.0, "float8_e5m2"))
CLEAN = (_square(1e30, "float32"), _square(1e25, "float8_e5m2"))
