"""half-precision-loss: the loss is computed in half.

What it does:
    Looks for loss operations with a half result, and for a loss that is in half itself. An error where a value is
    infinite, NaN or zero that is not so in float64, a warning otherwise.

Why it matters:
    The square of 300 is infinite in float16; the logarithm of a probability below 6e-8 is that of zero. In bfloat16
    two losses that differ by less than 0.4 percent are often equal, so a curve of them stands still. The gradient
    begins with these values. Autocast runs the losses it knows in float32; a model cast with .half() or .bfloat16()
    does not.

Use instead:
    F.cross_entropy(logits.float(), labels), and the same for every other loss.

Known limits:
    A loss that is put together by hand is seen only by the type of its last value.
"""

from collections.abc import Iterator

from nanhunt.records.dtype_audit import HALF, DtypeAudit, OpPlace, OpUse, Root, ShadowError
from nanhunt.rules.dtype_places import by_line, half_inputs, in_modules, joined_error, location, lost_to
from nanhunt.rules.registry import Judgement, Rule

LOSSES = frozenset(
    f"aten::{name}"
    for name in (
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "multi_margin_loss"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_margin_loss_forward", "_ctc_loss"),
        *("nll_loss_forward", "nll_loss2d_forward"),
    )
)
"""Losses that are one operation."""

_LOG_SOFTMAX = "aten::_log_softmax"
_NLL = ("aten::nll_loss_forward", "aten::nll_loss2d_forward")


def _judge(audit: DtypeAudit) -> tuple[Judgement, ...] | None:
    forward = [use for use in audit.uses if use.place.phase == "forward" and use.output in HALF and half_inputs(use)]
    lines = {_line(use.place) for use in forward if use.place.op in _NLL}
    found = [use for use in forward if use.place.op in LOSSES]
    # Cross entropy is two operations at one line; that of the logarithm may have lost something, too.
    logs = [use for use in forward if use.place.op == _LOG_SOFTMAX and _line(use.place) in lines]
    judgements = tuple(_judgements(found, logs))
    return judgements or _of_root(audit.root)


def _judgements(found: list[OpUse], logs: list[OpUse]) -> Iterator[Judgement]:
    for uses in by_line(found):
        use = uses[0]
        parts = [*uses, *(log for log in logs if _line(log.place) == _line(use.place))]
        yield _judgement(use.place, use.output, joined_error(parts), in_modules(uses))


def _of_root(root: Root | None) -> tuple[Judgement, ...] | None:
    if root is None or root.dtype not in HALF:
        return None
    place = root.place or OpPlace("")
    return (_judgement(place, root.dtype, None, (f"its value is {root.value:.6g}",)),)


def _judgement(place: OpPlace, dtype: str, error: ShadowError | None, notes: tuple[str, ...]) -> Judgement:
    lost = ", ".join(lost_to(error)) if error is not None else ""
    size = f", off by {error.norm_relative:.2g} of its value" if error is not None and error.norm_relative else ""
    evidence: dict[str, object] = {"dtype": dtype}
    if error is not None:
        evidence |= {
            "relative_error": error.norm_relative,
            "num_overflow": error.num_overflow,
            "largest_in_float64": error.largest,
        }
    return Judgement(
        f"the loss is computed in {dtype}{f': {lost} where float64 is not' if lost else size}",
        evidence=evidence,
        notes=notes,
        help=("cast the model's output to float32 before the loss",),
        location=location(place),
        severity="error" if lost else "warning",
    )


def _line(place: OpPlace) -> tuple[object, str]:
    return place.source, place.module


RULE = Rule("NH413", "half-precision-loss", "half-precision-loss", _judge, judges=DtypeAudit, severity="warning")


def _use(op: str, error: ShadowError, dtype: str = "float16", inputs: tuple[str, ...] = ()) -> OpUse:
    return OpUse(OpPlace(f"aten::{op}"), inputs or (dtype,), dtype, error=error)


FLAGGED = (
    DtypeAudit((_use("mse_loss", ShadowError(1, num_overflow=1, largest=90000.0)),)),
    DtypeAudit(
        (
            _use("_log_softmax", ShadowError(40, norm_relative=2e-3), "bfloat16"),
            _use("nll_loss_forward", ShadowError(1, norm_relative=1e-3), "bfloat16"),
        )
    ),
    DtypeAudit(root=Root("bfloat16", 0.6931, OpPlace("aten::mean"))),
)
CLEAN = (
    DtypeAudit((_use("mse_loss", ShadowError(1), "float32"),), root=Root("float32", 0.7)),
    DtypeAudit((_use("_log_softmax", ShadowError(40, norm_relative=2e-3), "bfloat16"),)),
    DtypeAudit(),
)
