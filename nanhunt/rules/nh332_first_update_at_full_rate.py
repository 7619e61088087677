"""first-update-at-full-rate: the first update runs at the full rate, before a warm-up.

What it does:
    Looks at the first rates of the schedule's real curve, in each group whose curve has another shape. It holds where a
    warm-up is said and the first rate is the highest one; or where the first rate falls to less than half at once and
    then rises again.

Why it matters:
    Adam's first update has the size of the rate in every weight, whatever the gradient. A warm-up is there to keep that
    small, and a schedule that sets the rate only after the first step defeats it in the one step that matters most.

Use instead:
    Let the schedule set the rate when it is made, as torch's own schedules do, and step it after ``optimizer.step()``.
"""

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import ScheduleCurve
from nanhunt.rules.registry import Judgement, Rule


def _judge(curve: ScheduleCurve) -> Judgement | Skip | None:
    if curve.start:
        return Skip("the first update", f"the schedule is under way at step {curve.start:,} and cannot be asked for it")
    first, second, third = curve.at(0), curve.at(1), curve.at(2)
    if first is None or second is None or first <= 0 or first < 0.9 * curve.peak:
        return None
    falls = third is not None and second < first / 2 and third > second
    if not (falls or (curve.said_warmup or 0) > 1):
        return None
    return Judgement(
        f"the first update{curve.whose} runs at {first:.4g}, {first / curve.peak:.2g} of the highest rate",
        evidence={"first_rate": first, "second_rate": second, "peak_rate": curve.peak},
        notes=("the rate falls at once and then rises: the first update comes before the warm-up",)
        if falls
        else (f"a warm-up of {curve.said_warmup:,} steps is said, and the curve has none",),
        help=("set the warm-up's first rate before the first optimizer step",),
        location=Location("optimizer", step=0),
    )


RULE = Rule("NH332", "first-update-at-full-rate", "first-update-at-full-rate", _judge, ScheduleCurve, "warning")


def _curve(*rates: float, said: int | None = None) -> ScheduleCurve:
    peak = rates.index(max(rates))
    return ScheduleCurve("LambdaLR", len(rates), tuple(enumerate(rates)), max(rates), peak, said)


FLAGGED = (_curve(1e-3, 1e-5, 2e-5, 3e-5), _curve(1e-3, 9e-4, 8e-4, said=100))
CLEAN = (_curve(1e-5, 2e-5, 3e-5), _curve(1e-3, 9e-4, 8e-4), _curve(1e-3, 1e-3, 1e-3))
