"""half-precision-reduction: a sum, mean, norm or softmax in half lies further from float64 than rounding explains.

What it does:
    Runs reductions that give a half result again in float64, on the same inputs. It holds where the error, by norm, is
    above four times the eps of the type, or where a result is infinite or NaN that float64 has finite. The error of a
    sum is taken beside the sum of the magnitudes, so that a sum that cancels is not blamed for it.

Why it matters:
    Most reductions of torch add up in float32 and round once; those are silent here. Some add in the type itself: on
    the CPU `index_add` into a vector, `index_put(accumulate=True)`, `segment_reduce` and the gradient of an embedding.
    Twenty thousand float16 terms between 0 and 1 then give 2048 instead of 10000, for beyond 2048 adding 1 changes
    nothing. And no float16 sum, wherever it is added up, can be above 65504.

Use instead:
    Reduce in float32: x.float().sum(), torch.zeros(n, dtype=torch.float32).index_add(0, index, x.float()).

Known limits:
    Measured on this machine; kernels for other devices add up in an order of their own.
"""

from nanhunt.records.dtype_audit import HALF, DtypeAudit, OpPlace, OpUse, ShadowError
from nanhunt.rules.dtype_places import EPS, by_line, in_modules, joined_error, location, lost_to
from nanhunt.rules.registry import Judgement, Rule

_FAR = 4.0


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(use for use in audit.uses if _is_far(use))
    return tuple(_judgement(group) for group in groups) or None


def _is_far(use: OpUse) -> bool:
    if not use.num_terms or use.output not in HALF or use.error is None:
        return False
    error = use.error
    return bool(error.num_overflow or error.num_nan) or error.norm_relative > _FAR * EPS.get(use.output, 0.25)


def _judgement(uses: list[OpUse]) -> Judgement:
    use, error = uses[0], joined_error(uses)
    assert error is not None
    size = f"{error.norm_relative:.2g} of the result is lost"
    lost = ", ".join(lost_to(error)) if error.num_overflow or error.num_nan else size
    return Judgement(
        f"{use.place.op} in {use.output} over {use.num_terms:,} terms: {lost}",
        evidence={
            "num_terms": use.num_terms,
            "relative_error": error.norm_relative,
            "eps": EPS.get(use.output, 0.25),
            "num_elements": error.num_elements,
            "num_beyond_4_eps": error.num_beyond,
            "num_overflow": error.num_overflow,
            "largest_in_float64": error.largest,
        },
        notes=in_modules(uses),
        help=("cast to float32 before the reduction",),
        location=location(use.place),
        severity="error" if error.num_overflow or error.num_nan else "warning",
    )


RULE = Rule("NH411", "half-precision-reduction", "half-precision-reduction", _judge, judges=DtypeAudit)


def _use(error: ShadowError, op: str = "aten::index_add", dtype: str = "float16", terms: int = 20000) -> DtypeAudit:
    return DtypeAudit((OpUse(OpPlace(op, module="pool"), (dtype,), dtype, error=error, num_terms=terms),))


FLAGGED = (
    _use(ShadowError(2, norm_relative=0.795, largest=9990.0)),
    _use(ShadowError(1, num_overflow=1, largest=70000.0), "aten::sum"),
    _use(ShadowError(2, norm_relative=0.97), dtype="bfloat16"),
)
CLEAN = (
    _use(ShadowError(1, norm_relative=4.9e-4), "aten::mean"),
    _use(ShadowError(64, norm_relative=2e-3, max_relative=0.2, num_beyond=1), dtype="bfloat16"),
    _use(ShadowError(1, norm_relative=0.9), "aten::mul", terms=0),
    _use(ShadowError(1, norm_relative=0.01), dtype="float32"),
)
