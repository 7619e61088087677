"""infinite-second-moment: the running mean of squared gradients of an optimizer reached infinity.

What it does:
    Looks at ``exp_avg_sq``, ``max_exp_avg_sq``, ``square_avg`` and ``sum`` of the optimizer, and reports infinities
    where the weights are still finite.

Why it matters:
    The update is divided by the root of infinity: it is 0, in every later step. Infinity never decays, so these weights
    never move again, and nothing ever becomes NaN. One gradient above some 1e20 is enough, for its square overflows
    float32.

Use instead:
    Clip gradients by value before the optimizer sees them, find what made the large one, and go on from a checkpoint
    written before it. Loading weights alone is enough; loading the optimizer's state brings the infinity back.

Known limits:
    In a step that was not looked at, the infinity is found at the next look; the evidence says which steps lie between.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.health import Health, InfiniteMoment
from nanhunt.rules.registry import Judgement, Rule


def _judge(health: Health) -> Judgement | None:
    if not health.moments:
        return None
    first = min(health.moments, key=lambda moment: moment.step)
    others = len(health.moments) - 1
    return Judgement(
        f"{first.key} of {first.parameter} is infinite in {count(first.num_infinite, 'element')}"
        f" of {first.num_elements:,}; they never move again",
        evidence={
            "num_infinite": first.num_infinite,
            "first_index": list(first.first_index),
            "last_finite_step": first.last_finite_step,
        },
        notes=(f"{count(others, 'more moment')} at infinity",) if others else (),
        help=("clip gradients by value, and go on from a checkpoint written before this step",),
        location=Location(
            "optimizer", module=first.parameter.rpartition(".")[0], tensor=first.parameter, step=first.step
        ),
    )


RULE = Rule("NH303", "infinite-second-moment", "squared-gradient-overflow", _judge, Health)

FLAGGED = (Health(moments=(InfiniteMoment("head.weight", "exp_avg_sq", 5, 4, 1, 64, (0, 3)),)),)
CLEAN = (Health(num_steps=6),)
