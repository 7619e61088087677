"""non-finite-update: a step makes weights non-finite, though weights and gradients are finite.

What it does:
    Takes one step on copies of the parameters and counts the elements that became non-finite where the weight and its
    gradient were finite.

Why it matters:
    The fault lies between gradient and weight: in the settings, in the optimizer's state, or in a type whose range the
    update exceeds.

Use instead:
    Look at the other findings about settings and state; run ``nanhunt.trace`` for the operation inside the step.

Known limits:
    One step, at the highest planned rate. Where gradients were made, real ones may do otherwise.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import DryRun, UpdateFacts
from nanhunt.rules.registry import Judgement, Rule


def _judge(run: DryRun) -> Judgement | None:
    found = [one for one in run.updates if one.num_nonfinite]
    if not found:
        return None
    total = sum(one.num_nonfinite for one in found)
    return Judgement(
        f"one step makes {count(total, 'weight')} non-finite, from finite weights and gradients",
        evidence={"num_nonfinite": total, "rate": found[0].lr, "dtypes": sorted({one.dtype for one in found})},
        notes=(f"one step on copies, with gradients {run.gradients}, at {run.rate}",),
        help=("look at eps, the rate and the optimizer's state",),
        location=Location("optimizer", tensor=found[0].first_nonfinite),
    )


RULE = Rule("NH331", "non-finite-update", "non-finite-update", _judge, DryRun)


def _run(num_nonfinite: int) -> DryRun:
    update = UpdateFacts(0, "float16", 1e-3, 4, 1000, 0, (), num_nonfinite, "head.weight" if num_nonfinite else "")
    return DryRun("of unit size", "the highest planned rate", (update,))


FLAGGED = (_run(3),)
CLEAN = (_run(0),)
