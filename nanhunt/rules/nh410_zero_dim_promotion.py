"""zero-dim-promotion: a 0-dim float32 tensor does not widen a half tensor, and the result does not fit into half.

What it does:
    Looks at operations of a half tensor with a 0-dim tensor of a wider type, whose value half does not have. It holds
    where that costs something against the same operation in float64: results that overflow, or, in the forward pass, an
    error above four times the eps of the result, by norm, which is more than roundings explain.

Why it matters:
    float16 with float32 gives float32, unless the float32 tensor has no dimensions: then the result is float16. On the
    CPU even the order counts: `scale * x.half()` rounds the scale to float16 first, so that 1e5 makes every element
    infinite and 1e-9 every element zero; `x.half() * scale` computes with 1e5 and overflows where x is above 0.65.

Example:
    scale = nn.Parameter(torch.tensor(1e5))
    logits = features.half() * scale

Use instead:
    features.float() * scale, or a scale of shape (1,), which counts as a tensor and widens the result.

Known limits:
    A plain Python number never widens a result; nobody expects it to, and it is not judged here. A number that becomes
    -inf is taken for a mask unless it is multiplied with.

References:
    The documentation of torch.result_type; the audit's own table of promotions is asked of it at run time.
"""

from math import inf

from nanhunt.records.dtype_audit import BEYOND, DtypeAudit, OpPlace, OpUse, ShadowError, ZeroDim
from nanhunt.rules.dtype_places import EPS, by_line, in_modules, joined_error, location, lost_to
from nanhunt.rules.registry import Judgement, Rule

_SCALINGS = ("aten::mul", "aten::div")


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    groups = by_line(use for use in audit.uses if use.zero_dim is not None and _costs(use))
    return tuple(_judgement(group) for group in groups) or None


def _costs(use: OpUse) -> bool:
    error = use.error
    assert use.zero_dim is not None
    if error is None or use.zero_dim.rounded == use.zero_dim.value:
        # A value that half has is not at fault, whatever becomes of the result.
        return False
    is_mask = use.zero_dim.rounded == -inf and not use.place.op.startswith(_SCALINGS)
    if is_mask and not error.num_nan and error.num_overflow == error.num_negative_overflow:
        return False
    if error.num_overflow or error.num_nan:
        return True
    # A gradient of a half tensor is half in the end, whatever widens it on the way.
    far = BEYOND * EPS.get(use.output, 0.25)
    return use.place.phase == "forward" and error.norm_relative > far


def _judgement(uses: list[OpUse]) -> Judgement:
    use, error = uses[0], joined_error(uses)
    assert use.zero_dim is not None
    assert error is not None
    scalar = use.zero_dim
    lost = ", ".join(lost_to(error)) or f"off by {error.norm_relative:.2g}"
    return Judgement(
        f"a 0-dim {scalar.dtype} tensor of {scalar.value:.6g} does not widen {use.output}: {lost}",
        evidence={
            "value": scalar.value,
            "value_in_result_type": scalar.rounded,
            "num_elements": error.num_elements,
            "num_overflow": error.num_overflow,
            "num_to_zero": error.num_to_zero,
            "relative_error": error.norm_relative,
        },
        notes=("a tensor with a dimension would widen it", *in_modules(uses)),
        help=(f"cast the {use.output} tensor up, or give the 0-dim tensor a dimension",),
        location=location(use.place),
        severity="error" if error.num_overflow or error.num_nan else "warning",
    )


RULE = Rule("NH410", "zero-dim-promotion", "zero-dim-promotion", _judge, judges=DtypeAudit)


def _use(scalar: ZeroDim, error: ShadowError | None, output: str = "float16", op: str = "aten::mul") -> DtypeAudit:
    inputs = (output, f"{scalar.dtype} ()")
    return DtypeAudit((OpUse(OpPlace(op, module="head"), inputs, output, error=error, zero_dim=scalar),))


_LARGE = ZeroDim("float32", 1e5, inf)
_TINY = ZeroDim("float32", 1e-9, 0.0)

FLAGGED = (
    _use(_LARGE, ShadowError(8, num_overflow=8)),
    _use(_TINY, ShadowError(8, max_relative=1.0, norm_relative=1.0, num_to_zero=1)),
)
CLEAN = (
    _use(ZeroDim("float32", 100.0, 100.0), ShadowError(8, num_overflow=2)),
    _use(ZeroDim("float32", 0.1, 0.09997559), ShadowError(8, max_relative=0.4, norm_relative=5e-4, num_beyond=1)),
    _use(ZeroDim("float32", -3.4e38, -inf), ShadowError(8, num_overflow=4, num_negative_overflow=4), op="aten::add"),
    _use(_LARGE, None),
    DtypeAudit(),
)
"""The value is one that half has, so another cause made the overflow; an ordinary rounding; a mask."""
