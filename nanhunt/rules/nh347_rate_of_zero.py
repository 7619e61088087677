"""rate-of-zero: the rate of a group is 0 in every planned step.

What it does:
    Looks at the highest rate of each group over the planned steps: that of the schedule's curve, or the rate as it
    stands where there is no schedule. It holds where that is 0 and the group has trainable parameters.

Why it matters:
    No step moves these weights, and nothing says so: the loss is finite, the gradients are. A schedule that divides
    whole numbers (``step // warmup_steps``), or one that is never reached, gives such a curve.

Use instead:
    Freeze what is not to be trained with ``requires_grad_(False)``; else print the first rates of the schedule.

Known limits:
    A loop that sets the rate by hand looks the same. A schedule that nobody has named, one that follows a metric, and
    one that is under way and cannot be asked for its past are not judged, nor is an optimizer that moves a weight at
    a rate of 0, since it finds its rate by itself.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import PlannedRates
from nanhunt.rules.registry import Judgement, Rule


def _judge(rates: PlannedRates) -> Judgement | Skip | None:
    if all(peak is None for peak in rates.peaks):
        return Skip(
            "the highest rate", "the schedule cannot be asked for it, or the optimizer finds its rate by itself"
        )
    groups = [index for index, peak in enumerate(rates.peaks) if peak == 0 and rates.num_trained[index]]
    if not groups:
        return None
    by = f"by the {rates.kind}" if rates.kind else "without a schedule"
    named = ", ".join(map(str, groups[:3]))
    more = f" and {len(groups) - 3:,} more" if len(groups) > 3 else ""
    return Judgement(
        f"the rate of {'group' if len(groups) == 1 else 'groups'} {named}{more} is 0 in each of"
        f" {count(rates.num_steps, 'step')}, {by}",
        evidence={
            "num_groups": len(groups),
            "num_parameters": sum(rates.num_trained[index] for index in groups),
            "num_steps": rates.num_steps,
        },
        notes=(
            f"no step moves {count(sum(rates.num_trained[index] for index in groups), 'parameter')}",
            *(() if rates.kind else ("a loop that sets the rate by hand before each step looks the same",)),
        ),
        help=("set a rate, or look at what the schedule gives for its first steps",),
        location=Location("optimizer"),
    )


RULE = Rule("NH347", "rate-of-zero", "rate-of-zero", _judge, PlannedRates, "warning")

FLAGGED = (PlannedRates("", 10_000, (0.0,), (4,)), PlannedRates("LambdaLR", 5_000, (1e-3, 0.0, 0.0), (2, 2, 1)))
CLEAN = (PlannedRates("LambdaLR", 5_000, (1e-3, 1e-8), (2, 2)), PlannedRates("", 10, (1e-3, 0.0), (4, 0)))
