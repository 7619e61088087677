"""complex32: complex numbers are in half precision.

What it does:
    Holds where an operation gives complex32. An error where a result is infinite or NaN that float64 has finite.

Why it matters:
    Real and imaginary part are float16 each: a squared magnitude overflows from 256 on, a spectrum of a few hundred
    samples does as well. Few operations exist for the type, so the step may end in an error on another device.

Use instead:
    complex64: cast to float32 before the Fourier transform.

Known limits:
    Operations that do not exist in complex32 raise; the report then says what the step ended in.
"""

from nanhunt.records.dtype_audit import DtypeAudit, OpPlace, OpUse, ShadowError
from nanhunt.rules.dtype_places import by_line, in_modules, joined_error, location, lost_to
from nanhunt.rules.registry import Judgement, Rule

_VIEWS = ("aten::view", "aten::t", "aten::transpose", "aten::detach", "aten::alias", "aten::slice", "aten::select")


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    found = [use for use in audit.uses if use.output == "complex32" and use.place.op not in _VIEWS]
    return tuple(_judgement(group) for group in by_line(found)) or None


def _judgement(uses: list[OpUse]) -> Judgement:
    use, error = uses[0], joined_error(uses)
    lost = ", ".join(lost_to(error)) if error is not None else ""
    is_broken = error is not None and bool(error.num_overflow or error.num_nan)
    return Judgement(
        f"{use.place.op} gives complex32{f': {lost} where float64 is not' if lost else ''}",
        evidence={
            "num_runs": sum(one.count for one in uses),
            **({"relative_error": error.norm_relative, "num_overflow": error.num_overflow} if error else {}),
        },
        notes=in_modules(uses),
        help=("cast to float32 before, for complex64",),
        location=location(use.place),
        severity="error" if is_broken else "warning",
    )


RULE = Rule("NH418", "complex32", "complex32", _judge, judges=DtypeAudit, severity="warning")


def _use(output: str, error: ShadowError | None = None, op: str = "aten::_fft_r2c") -> DtypeAudit:
    return DtypeAudit((OpUse(OpPlace(op, module="spectrum"), ("float16",), output, error=error),))


FLAGGED = (_use("complex32"), _use("complex32", ShadowError(33, num_overflow=1)))
CLEAN = (_use("complex64"), _use("complex32", op="aten::view"), DtypeAudit())
