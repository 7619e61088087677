"""half-overflow: an operation in half gives infinity or NaN where float64 is finite.

What it does:
    Runs operations with a half result again in float64 on the same finite inputs. It holds where elements are infinite
    or NaN in half only. Reductions, losses, conversions and 0-dim tensors have rules of their own.

Why it matters:
    float16 ends at 65504: queries and keys of length 40 over 64 dimensions are enough for a product beyond it. The
    softmax after it gives NaN, whatever it does with large finite values.

Use instead:
    bfloat16, which has the range of float32, or a scale before the product and not after it.

Known limits:
    -inf alone, in a sum or a scaling, is taken for a mask that was meant.
"""

from nanhunt.numerics import count
from nanhunt.records.dtype_audit import HALF, DtypeAudit, OpPlace, OpUse, ShadowError, ZeroDim
from nanhunt.rules.dtype_places import by_line, in_modules, joined_error, location
from nanhunt.rules.nh413_half_precision_loss import LOSSES
from nanhunt.rules.registry import Judgement, Rule

_MASKS = frozenset(f"aten::{name}{end}" for name in ("add", "sub", "rsub", "mul", "div") for end in ("", "_"))


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(use for use in audit.uses if _overflows(use))
    return tuple(_judgement(group) for group in groups) or None


def _overflows(use: OpUse) -> bool:
    error = use.error
    if error is None or use.output not in HALF or use.output == "complex32" or use.num_terms:
        return False
    if use.place.op in LOSSES or use.place.op in ("aten::_to_copy", "aten::copy_") or use.num_inherited:
        return False
    if use.zero_dim is not None and use.zero_dim.rounded != use.zero_dim.value:
        return False
    is_mask = use.place.op in _MASKS and not error.num_nan and error.num_overflow == error.num_negative_overflow
    return bool(error.num_overflow or error.num_nan) and not is_mask


def _judgement(uses: list[OpUse]) -> Judgement:
    use, error = uses[0], joined_error(uses)
    assert error is not None
    number = error.num_overflow + error.num_nan
    return Judgement(
        f"{use.place.op} gives {count(number, 'element')} in {use.output} that float64 has finite, up to"
        f" {error.largest:.6g}",
        evidence={
            "num_elements": error.num_elements,
            "num_overflow": error.num_overflow,
            "num_nan": error.num_nan,
            "largest_in_float64": error.largest,
        },
        notes=in_modules(uses),
        help=("scale before the operation, or run it in bfloat16 or float32",),
        location=location(use.place),
    )


RULE = Rule("NH420", "half-overflow", "half-overflow", _judge, judges=DtypeAudit)


def _use(op: str, error: ShadowError, scalar: ZeroDim | None = None) -> DtypeAudit:
    return DtypeAudit((OpUse(OpPlace(op, module="attention"), ("float16",), "float16", error=error, zero_dim=scalar),))


FLAGGED = (
    _use("aten::bmm", ShadowError(64, num_overflow=8, largest=102400.0)),
    _use("aten::add", ShadowError(64, num_overflow=2, num_negative_overflow=1, largest=9e4)),
)
CLEAN = (
    _use("aten::bmm", ShadowError(64, max_relative=0.1)),
    _use("aten::add", ShadowError(64, num_overflow=8, num_negative_overflow=8, largest=131008.0)),
    _use("aten::mul", ShadowError(64, num_overflow=8), ZeroDim("float32", 1e5, float("inf"))),
)
