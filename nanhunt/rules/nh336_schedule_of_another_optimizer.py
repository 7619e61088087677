"""schedule-of-another-optimizer: the schedule changes the groups of another optimizer than this one.

What it does:
    Compares the groups that the schedule writes its rates into with those of the optimizer, by identity.

Why it matters:
    The rate of this optimizer stays as it is, whatever the schedule says. So it is where the optimizer was made again,
    for instance after wrapping the model, and the schedule was not.

Use instead:
    Make the schedule after the optimizer, from that optimizer.
"""

from nanhunt.findings import Location
from nanhunt.records.optimizer_audit import ScheduleCurve
from nanhunt.rules.registry import Judgement, Rule


def _judge(curve: ScheduleCurve) -> Judgement | None:
    if curve.is_own:
        return None
    return Judgement(
        f"the {curve.kind} drives another optimizer: its rates do not reach this one",
        evidence={"given_rate": curve.given_lr},
        help=("make the schedule from this optimizer",),
        location=Location("optimizer"),
    )


RULE = Rule("NH336", "schedule-of-another-optimizer", "schedule-of-another-optimizer", _judge, ScheduleCurve)

FLAGGED = (ScheduleCurve("StepLR", 10, ((0, 1e-3), (9, 1e-3)), 1e-3, 0, is_own=False),)
CLEAN = (ScheduleCurve("StepLR", 10, ((0, 1e-3), (9, 1e-3)), 1e-3, 0),)
