"""lost-terms: terms are added to a total that is too large to notice them.

What it does:
    Follows totals that one line adds to again and again, and keeps each of them in float64 beside. It holds where at
    least eight additions were made, a twentieth of the terms did not change the total, and the total is off by more
    than eight eps. It also holds where nine tenths of the terms of eight additions did not change it, and the largest
    addition is above eps / 64 of the total by norm: that is meant to be felt, a branch that begins at 1e-6 is not. Sums
    of one operation over many float32 terms are compared with float64, too: it holds from 1e-4.

Why it matters:
    Beyond 2048 adding 1 changes nothing in float16, beyond 256 in bfloat16, beyond 16777216 in float32. A loss that is
    added up over a long loop, a count or a running mean then stands still.

Example:
    total = torch.zeros((), dtype=torch.bfloat16)
    for part in parts:
        total += part.mean()

Use instead:
    A total in float32 or float64, or torch.stack(parts).sum(), which adds in pairs and in float32.

Known limits:
    A total is told by its line and its memory: one that is passed on through other operations is not followed, as a
    residual stream to which two lines add in turn. Only its first 65,536 elements are.
"""

from collections.abc import Iterator

from nanhunt.numerics import count
from nanhunt.records.dtype_audit import Accumulation, DtypeAudit, OpPlace, OpUse, ShadowError
from nanhunt.rules.dtype_places import EPS, by_line, in_modules, joined_error, location
from nanhunt.rules.registry import Judgement, Rule

_ADDITIONS = 8
_SHARE = 0.05
_FAR = 8.0
_ALL = 0.9
_MEANT = 1 / 64
"""Of eps: terms beyond this are meant to be felt. Residual branches that are scaled to begin small lie at 1 / 250."""
_FLOAT32_ERROR = 1e-4


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    totals = by_line(total for total in audit.accumulations if _is_lost(total))
    sums = by_line(use for use in audit.uses if _is_lossy_sum(use))
    return (*map(_of_total, totals), *_of_sums(sums)) or None


def _is_lost(total: Accumulation) -> bool:
    eps = EPS.get(total.dtype, 0.25)
    if total.num_additions < _ADDITIONS or not total.num_terms:
        return False
    lost = total.num_lost / total.num_terms
    return (lost >= _SHARE and total.relative_error > _FAR * eps) or (lost >= _ALL and total.term_share > _MEANT * eps)


def _is_lossy_sum(use: OpUse) -> bool:
    return (
        use.num_terms > 1
        and use.output == "float32"
        and set(use.inputs) == {"float32"}
        and use.error is not None
        and use.error.norm_relative > _FLOAT32_ERROR
    )


def _of_total(totals: list[Accumulation]) -> Judgement:
    worst = max(totals, key=lambda total: total.relative_error)
    return Judgement(
        f"{worst.num_lost:,} of {count(worst.num_terms, 'term')} did not change the {worst.dtype} total they were"
        f" added to",
        evidence={
            "num_additions": worst.num_additions,
            "num_lost": worst.num_lost,
            "relative_error": worst.relative_error,
        },
        notes=in_modules(totals),
        help=("keep the total in float32 or float64, or stack the terms and sum them at once",),
        location=location(worst.place),
    )


def _of_sums(groups: list[list[OpUse]]) -> Iterator[Judgement]:
    for uses in groups:
        use, error = uses[0], joined_error(uses)
        assert error is not None
        yield Judgement(
            f"{use.place.op} over {use.num_terms:,} float32 terms is off by {error.norm_relative:.2g}",
            evidence={"num_terms": use.num_terms, "relative_error": error.norm_relative},
            notes=in_modules(uses),
            help=("add up in float64",),
            location=location(use.place),
        )


RULE = Rule("NH417", "lost-terms", "lost-terms", _judge, judges=DtypeAudit, severity="warning")

_PLACE = OpPlace("aten::add_", module="head")


def _sum(error: float, op: str = "aten::index_add") -> DtypeAudit:
    use = OpUse(OpPlace(op), ("float32",), "float32", error=ShadowError(1, norm_relative=error), num_terms=30_000_000)
    return DtypeAudit((use,))


FLAGGED = (
    DtypeAudit(accumulations=(Accumulation(_PLACE, "bfloat16", 1000, 1000, 744, 0.744),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "float32", 100, 100, 100, 1e-5),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "bfloat16", 20, 640, 640, 1e-4, term_share=3e-4),)),
    _sum(0.44),
)
CLEAN = (
    DtypeAudit(accumulations=(Accumulation(_PLACE, "bfloat16", 12, 12000, 300, 0.004),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "float16", 4, 4, 4, 0.5),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "float32", 9, 9, 9, 1e-9),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "bfloat16", 20, 640, 640, 1e-6, term_share=1e-6),)),
    DtypeAudit(accumulations=(Accumulation(_PLACE, "bfloat16", 20, 640, 300, 1e-3, term_share=3e-3),)),
    _sum(7e-7),
)
"""The residual stream of twelve layers; too few additions to call it a total; what is lost is below the last digit; a
branch that begins at next to nothing; a stream that takes half of what its branches give."""
