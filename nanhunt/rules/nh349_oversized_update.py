"""oversized-update: a step of an optimizer that divides by the gradient's size moves a weight far more than its rate.

What it does:
    Takes one step on copies of the parameters. It holds where the update does not grow with the gradient, as that of
    Adam, and yet a finite weight moves by more than 100 times the rate, and by more than the largest weight there is.
    What weight decay takes is left out.

Why it matters:
    Adam bounds its update by a few times the rate only as long as the second moment holds the gradient's square. A
    gradient of 1e-22 has a square of 1e-44, which times 0.001 is 0 in float32; what is left is a division by ``eps``.
    With ``eps=1e-30`` and a rate of 1e-3 the weight becomes 1e5 in one step.

Use instead:
    The usual ``eps`` of 1e-8, or 1e-6; a warm-up does not help where the division is by nearly 0.

Known limits:
    The gradients of one step; an optimizer that scales its update with the norm of the weights moves them by less than
    they are and passes.
"""

from nanhunt.findings import Location
from nanhunt.records.optimizer_audit import DryRun, UpdateFacts
from nanhunt.rules.registry import Judgement, Rule

# Adam's largest possible update is some 7 times the rate with the usual betas.
_MOST = 100.0


def _judge(run: DryRun) -> Judgement | None:
    found = [one for one in run.updates if _is_oversized(one)]
    if not found:
        return None
    worst = max(found, key=lambda one: one.largest_change / one.lr)
    return Judgement(
        f"a step at a rate of {worst.lr:.3g} moves a weight of group {worst.group} by {worst.largest_change:.3g}",
        evidence={
            "rate": worst.lr,
            "largest_change": worst.largest_change,
            "largest_weight_before": worst.largest_weight,
            "dtype": worst.dtype,
        },
        notes=(f"one step on copies, with gradients {run.gradients}, at {run.rate}",),
        help=("raise eps: the square of a small gradient may be 0 in the second moment",),
        location=Location("optimizer"),
    )


def _is_oversized(update: UpdateFacts) -> bool:
    is_bounded = update.lr > 0 and not update.depends_on_size
    return is_bounded and update.largest_change > max(_MOST * update.lr, update.largest_weight)


RULE = Rule("NH349", "oversized-update", "oversized-update", _judge, DryRun, "warning")


def _run(change: float, weight: float = 0.3, *, sized: bool = False) -> DryRun:
    update = UpdateFacts(
        0, "float32", 1e-3, 4, 100, depends_on_size=sized, largest_change=change, largest_weight=weight
    )
    return DryRun("stored", "the highest planned rate", (update,))


FLAGGED = (_run(1e5),)
CLEAN = (_run(7e-3), _run(1e5, sized=True), _run(0.2, 30.0))
