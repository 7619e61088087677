"""clip-before-unscale: gradients are clipped while they still carry the loss scale.

What it does:
    Looks at the gradients between clipping and ``scaler.step``. It holds where the scaler has not unscaled them, and
    their total norm is the clipping norm: they were clipped as they are.

Why it matters:
    The norm that was compared is the true one times the loss scale, of 65,536 for instance. So every step is clipped,
    and what remains, once the scale is taken out, is that much smaller than meant.

Use instead:
    ``scaler.unscale_(optimizer)`` before ``clip_grad_norm_``.

Known limits:
    Gradients that are not stored at the time of the audit cannot be judged.
"""

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import Clipping
from nanhunt.rules.registry import Judgement, Rule


def _judge(clipping: Clipping) -> Judgement | Skip | None:
    if clipping.scale is None or clipping.scale <= 1:
        return None
    if abs(clipping.norm - clipping.max_norm) > 1e-3 * clipping.max_norm:
        return Skip("clipping", "the gradients are scaled and not clipped: it is not known which comes first")
    return Judgement(
        f"gradients are clipped to {clipping.max_norm:g} while they carry a loss scale of {clipping.scale:g}",
        evidence={"norm": clipping.norm, "scale": clipping.scale, "norm_without_scale": clipping.norm / clipping.scale},
        help=("call scaler.unscale_(optimizer) before clipping",),
        location=Location("optimizer"),
    )


RULE = Rule("NH337", "clip-before-unscale", "clip-before-unscale", _judge, Clipping)

FLAGGED = (Clipping(1.0, 0.999999, 4, scale=65536.0),)
CLEAN = (Clipping(1.0, 0.999999, 4), Clipping(1.0, 293_086.0, 4))
