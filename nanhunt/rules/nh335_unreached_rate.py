"""unreached-rate: the planned steps end while the rate is still rising, far below the one that was asked for.

What it does:
    Looks at the schedule's curve over the planned steps. It holds where the rate never falls, still rises at the end,
    and has not reached half of the rate that the optimizer was made with.

Why it matters:
    The run takes place in the warm-up. With a warm-up of 154,040 steps to 5e-5, the rate after 300 steps is 1e-7:
    nothing is learned, and whatever fails in these steps is no matter of the optimizer.

Use instead:
    A warm-up measured in updates of this run, a few percent of them.
"""

from itertools import pairwise

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import ScheduleCurve
from nanhunt.rules.registry import Judgement, Rule


def _judge(curve: ScheduleCurve) -> Judgement | Skip | None:
    if not curve.is_planned:
        return Skip("the end of the schedule", "nobody says how many steps are planned (num_steps)")
    rates = [rate for _, rate in curve.samples]
    if len(rates) < 3 or any(later < earlier for earlier, later in pairwise(rates)) or not rates[-1] > rates[-2]:
        return None
    if not 0 < rates[-1] < curve.given_lr / 2:
        return None
    return Judgement(
        f"after {curve.num_steps:,} steps the rate{curve.whose} is {rates[-1]:.3g} and still rising"
        f" to {curve.given_lr:g}",
        evidence={"last_rate": rates[-1], "given_rate": curve.given_lr, "share": rates[-1] / curve.given_lr},
        help=("shorten the warm-up to a few percent of the planned steps",),
        location=Location("optimizer", step=curve.num_steps - 1),
    )


RULE = Rule("NH335", "unreached-rate", "unreached-rate", _judge, ScheduleCurve, "warning")


def _curve(*rates: float) -> ScheduleCurve:
    return ScheduleCurve("LambdaLR", len(rates), tuple(enumerate(rates)), 5e-5, rates.index(max(rates)))


FLAGGED = (_curve(3.2e-10, 6.5e-10, 9.7e-10),)
CLEAN = (_curve(1e-5, 3e-5, 5e-5), _curve(1e-6, 2e-6, 2e-6), _curve(1e-6, 2e-6, 1e-6))
