"""group-without-schedule: the optimizer has other groups than the schedule was made for.

What it does:
    Compares how many groups the schedule has rates for with how many the optimizer has, and steps a copy of the
    schedule to see what becomes of it.

Why it matters:
    A group that is added later (``add_param_group``, as where layers are unfrozen) is not known to the schedule. torch
    raises at the next ``scheduler.step()``, after it has set the rates of the groups that it knows; other schedules
    pass over the group, which then stays at its full rate.

Use instead:
    Make the schedule after the last group, or make all groups at once and freeze those whose time has not come.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import PlannedRates
from nanhunt.rules.registry import Judgement, Rule


def _judge(rates: PlannedRates) -> Judgement | None:
    known, present = rates.num_scheduled, len(rates.peaks)
    if known is None or known == present:
        return None
    effect = f"its next step raises {rates.failure}" if rates.failure else "its steps pass over the others"
    return Judgement(
        f"the {rates.kind} has rates for {count(known, 'group')}, the optimizer has {present:,}",
        evidence={"num_scheduled": known, "num_groups": present},
        notes=(effect,),
        help=("make the schedule after the last add_param_group",),
        location=Location("optimizer"),
    )


RULE = Rule("NH348", "group-without-schedule", "group-without-schedule", _judge, PlannedRates)

FLAGGED = (
    PlannedRates("LambdaLR", 1_000, (1e-3, 1e-3), (1, 5), 1, "ValueError: zip() argument 2 is shorter than argument 1"),
    PlannedRates("Warmup", 1_000, (1e-3, 1e-3), (1, 5), 1),
)
CLEAN = (PlannedRates("LambdaLR", 1_000, (1e-3, 1e-3), (1, 5), 2), PlannedRates("", 1_000, (1e-3,), (1,)))
