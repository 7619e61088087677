"""idle-updates: for a good part of the schedule the rate is too small to move any weight.

What it does:
    Compares the rate at each step of the schedule with half the distance between two numbers at the median weight, for
    optimizers whose updates have the size of the rate. It holds where a tenth of the planned steps or more are below
    it, and the highest rate is not.

Why it matters:
    In these steps the update is lost in the addition. The loss stands still, and nothing looks wrong.

Use instead:
    A schedule that begins and ends higher; weights in float32.

Known limits:
    Weights far smaller than the median still move. Where even the highest rate is too small,
    ``update-below-precision`` says so.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import ulp
from nanhunt.records.optimizer_audit import ScheduleCurve
from nanhunt.rules.registry import Judgement, Rule


def _judge(curve: ScheduleCurve) -> Judgement | Skip | None:
    if curve.num_idle is None:
        return Skip(
            "idle updates", "the updates grow with the gradients, or no step could be tried, so the rate says nothing"
        )
    num_seen = curve.num_steps - curve.start
    if not 0.1 * num_seen <= curve.num_idle < num_seen:
        return None
    least = ulp(curve.typical_weight, curve.dtype) / 2
    return Judgement(
        f"in {curve.num_idle:,} of {num_seen:,} steps the rate{curve.whose} is too small to move a weight of"
        f" {curve.typical_weight:.3g} in {curve.dtype}",
        evidence={"num_idle": curve.num_idle, "least_rate": least, "peak_rate": curve.peak},
        notes=("an update of the size of the rate is lost where it is below half the distance to the next number",),
        help=("raise the rate, or keep the weights in float32",),
        location=Location("optimizer"),
    )


RULE = Rule("NH334", "idle-updates", "lost-update", _judge, ScheduleCurve, "warning")


def _curve(num_idle: int | None) -> ScheduleCurve:
    return ScheduleCurve("LambdaLR", 1000, ((0, 1e-9), (999, 1e-3)), 1e-3, 999, None, num_idle, 0.05, "float32")


FLAGGED = (_curve(100), _curve(999))
CLEAN = (_curve(5), _curve(1000))
