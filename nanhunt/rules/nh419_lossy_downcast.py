"""lossy-downcast: a conversion to a smaller type loses more than digits.

What it does:
    Looks at conversions that narrow a type. It holds where finite values lie beyond the range of the type; where, in
    the forward pass, underflow takes more than a hundredth of a tensor by norm; and where the rounding is large beside
    the spread of the values: more than a hundredth for float64 to float32, more than a tenth for a tensor of the batch
    in half.

Why it matters:
    float16 ends at 65504 and is infinite from there on. float8_e4m3fn ends at 448 and stays there, float8_e4m3fnuz ends
    at 240 and is NaN. A tensor of times in seconds since 1970 has no two values less than 128 seconds apart in float32.
    The conversion raises nothing.

Use instead:
    Subtract the offset or scale before the conversion; bfloat16 where range is needed.

Known limits:
    Values that become -inf and are all the same are taken for a mask. The spread is that of the whole tensor: one
    channel with a large offset hides behind others. Underflow of gradients is not judged, for the audit has no loss
    scale.
"""

from nanhunt.numerics import count
from nanhunt.records.dtype_audit import HALF, DtypeAudit, Narrowing, OpPlace
from nanhunt.rules.dtype_places import by_line, in_modules, location
from nanhunt.rules.registry import Judgement, Rule

_LOST = 0.01
_SPREAD = 0.01
_SPREAD_IN_HALF = 0.1


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(one for one in audit.narrowings if _reason(one))
    return tuple(_judgement(group) for group in groups) or None


def _reason(one: Narrowing) -> str:
    if one.num_overflow and not one.is_mask:
        return f"{count(one.num_overflow, 'value')} beyond its range, the largest {one.largest:.6g}"
    # Of the batch, the rule for labels speaks.
    if one.place.phase == "forward" and not one.tensor and one.lost > _LOST:
        return f"{one.num_to_zero:,} of {count(one.num_nonzero, 'value')} became 0"
    if _is_spread_lost(one):
        return f"the rounding is {one.spread_error:.2g} of the spread of the values"
    return ""


def _is_spread_lost(one: Narrowing) -> bool:
    if one.target in HALF:
        return bool(one.tensor) and one.spread_error > _SPREAD_IN_HALF
    return one.source == "float64" and one.spread_error > _SPREAD


def _judgement(group: list[Narrowing]) -> Judgement:
    worst = max(group, key=lambda one: (one.num_overflow, one.lost, one.spread_error))
    is_broken = worst.num_overflow and not worst.is_mask
    return Judgement(
        f"{worst.tensor or 'a tensor'} from {worst.source} to {worst.target}: {_reason(worst) or _reason(group[0])}",
        evidence={
            "num_elements": worst.num_elements,
            "num_overflow": worst.num_overflow,
            "num_to_zero": worst.num_to_zero,
            "largest": worst.largest,
            "rounding_over_spread": worst.spread_error,
        },
        notes=in_modules(group),
        help=("scale or centre the values before the conversion, or keep the wider type",),
        location=location(worst.place, worst.tensor),
        severity="error" if is_broken else "warning",
    )


RULE = Rule("NH419", "lossy-downcast", "lossy-downcast", _judge, judges=DtypeAudit, severity="warning")


def _cast(source: str = "float32", target: str = "float16", **facts: object) -> DtypeAudit:
    place = OpPlace("aten::_to_copy", module="embed")
    return DtypeAudit(narrowings=(Narrowing(place, source, target, **facts),))  # type: ignore[arg-type]


FLAGGED = (
    _cast(num_elements=8, num_overflow=3, largest=1e5),
    _cast(num_elements=8, num_nonzero=8, num_to_zero=7, lost=0.9, largest=1e-7),
    _cast("float64", "float32", tensor="batch.time", num_elements=8, spread_error=1.0, largest=1.7e9),
)
CLEAN = (
    _cast(num_elements=8, num_overflow=3, is_mask=True, largest=3.4e38),
    _cast(num_elements=8, num_nonzero=8, num_to_zero=1, lost=1e-8),
    _cast("float64", "float32", num_elements=8, spread_error=3e-8),
    _cast("float32", "bfloat16", num_elements=8, spread_error=0.3),
)
"""A mask; a weight near zero; data read as float64; the gains of a norm, all near 1."""
