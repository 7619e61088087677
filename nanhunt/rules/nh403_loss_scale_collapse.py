"""loss-scale-collapse: the loss scale fell so far that the loss itself is lost.

What it does:
    Looks at the scale after each step. It holds where the scale fell below 1e-4, or to 0.

Why it matters:
    A scaler halves its scale at every non-finite gradient and leaves the step out. Finding a scale takes a dozen
    halvings. Thirty in a row mean that no scale helps: the gradients are non-finite for another reason, no step is
    taken any more, and no error is ever raised.

Use instead:
    Look for the operation that makes the gradients non-finite; the scale is only where it shows. Stop the run when the
    scale falls below 1.

References:
    https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling
"""

from nanhunt.findings import Location
from nanhunt.records.health import Health, ScaleSample
from nanhunt.rules.registry import Judgement, Rule

_COLLAPSED = 1e-4


def _judge(health: Health) -> Judgement | None:
    low = next((sample for sample in health.scales if sample.scale < _COLLAPSED), None)
    if low is None or health.scales[0].scale <= low.scale or health.scales[-1].scale >= _COLLAPSED:
        return None
    first, last = health.scales[0], health.scales[-1]
    return Judgement(
        f"the loss scale fell from {first.scale:g} to {last.scale:g}",
        evidence={"first_scale": first.scale, "last_scale": last.scale, "last_change": last.step},
        notes=("every step on the way down was left out",) if low.is_skipped else (),
        help=("find what makes the gradients non-finite at any scale",),
        location=Location("backward", step=low.step),
    )


RULE = Rule("NH403", "loss-scale-collapse", "non-finite-gradients-at-any-scale", _judge, Health)


def _falling(num_halvings: int) -> Health:
    scales = (ScaleSample(step, 65536.0 / 2 ** (step + 1), True) for step in range(num_halvings))
    return Health(scales=(ScaleSample(0, 65536.0, False), *scales))


FLAGGED = (_falling(30), Health(scales=(ScaleSample(0, 2.0, False), ScaleSample(9, 0.0, True))))
CLEAN = (
    _falling(16),
    Health(scales=(ScaleSample(0, 1e-5, False),)),
    Health(scales=(*_falling(30).scales, ScaleSample(99, 1.0, False))),
)
