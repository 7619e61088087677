"""inherited-half-in-disabled-autocast: autocast is switched off, and what it made in half goes on in half.

What it does:
    Looks at operations inside `autocast(enabled=False)`, within a region where autocast is on. It holds where one of
    them computes with a half tensor that the outer region made, and rounds its result.

Why it matters:
    Switching autocast off ends the casts; it does not undo them. Tensors that come in as bfloat16 or float16 stay what
    they are, and the region that was meant to be float32 computes in half. What has to be cast up has to be cast by
    hand; after that, the region and its backward are in float32.

Example:
    with torch.autocast("cuda", enabled=False):
        energy = (hidden ** 2).mean()

Use instead:
    hidden.float() as the first thing in the region.

Known limits:
    A model with half parameters is not judged: there, half is what the weights are in. Regions are followed through
    `torch.autocast`, not through the functions below it.

References:
    Verified on torch 2.13: an inherited bfloat16 tensor stays bfloat16, and a product with float32 raises
"""

from nanhunt.records.dtype_audit import DtypeAudit, OpPlace, OpUse, ShadowError
from nanhunt.rules.dtype_places import by_line, half_inputs, in_modules, joined_error, location, lost_to
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(use for use in audit.uses if use.num_inherited)
    return tuple(_judgement(group) for group in groups) or None


def _judgement(uses: list[OpUse]) -> Judgement:
    use, error = uses[0], joined_error(uses)
    assert error is not None
    dtype = half_inputs(use)[0] if half_inputs(use) else use.output
    lost = ", ".join(lost_to(error))
    return Judgement(
        f"{use.place.op} runs in {dtype} where autocast is switched off: its input is from the region around it",
        evidence={
            "num_runs": sum(one.num_inherited for one in uses),
            "relative_error": error.norm_relative,
            "max_relative_error": error.max_relative,
            **({"lost": lost} if lost else {}),
        },
        notes=in_modules(uses),
        help=("cast with .float() at the beginning of the region",),
        location=location(use.place),
        severity="error" if error.num_overflow or error.num_nan else "warning",
    )


RULE = Rule(
    "NH415",
    "inherited-half-in-disabled-autocast",
    "inherited-half-in-disabled-autocast",
    _judge,
    judges=DtypeAudit,
    severity="warning",
)


def _use(num_inherited: int, error: ShadowError) -> DtypeAudit:
    place = OpPlace("aten::pow", module="energy")
    return DtypeAudit((OpUse(place, ("bfloat16",), "bfloat16", error=error, num_inherited=num_inherited),))


FLAGGED = (
    _use(1, ShadowError(32, max_relative=3.8e-3, norm_relative=1.7e-3)),
    _use(2, ShadowError(32, num_overflow=3)),
)
CLEAN = (_use(0, ShadowError(32, max_relative=3.8e-3, norm_relative=1.7e-3)), DtypeAudit())
