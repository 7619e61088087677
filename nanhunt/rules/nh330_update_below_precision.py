"""update-below-precision: at its highest rate, a step leaves most weights as they are.

What it does:
    Takes one step on copies of the parameters, at the highest planned rate, and counts the elements with a gradient
    that have the value they had. It holds for a group and type where that is more than half of them, or where whole
    parameters stand still though the optimizer's updates do not depend on the size of the gradient.

Why it matters:
    An update smaller than half the distance to the next number is lost in the addition, however often it is repeated.
    bfloat16 has 8 bits: at 1.0 an update below 0.002 does nothing, so norm gains never move.

Use instead:
    Weights in float32 under autocast, an optimizer with master weights or stochastic rounding, a larger rate.

Known limits:
    Where the optimizer's updates grow with the gradient, as in SGD, only gradients of a batch or stored ones say
    anything; with made ones the rule does not judge. Gradients that are tiny against ``eps`` count as lost updates.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import DryRun, UpdateFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(run: DryRun) -> Judgement | Skip | None:
    is_made = run.gradients not in ("of a batch", "stored")
    judged = [one for one in run.updates if one.lr > 0 and one.num_elements and not (is_made and one.depends_on_size)]
    found = [one for one in judged if _is_lost(one)]
    if not found:
        skipped = [one for one in run.updates if one.depends_on_size and is_made]
        reason = "the updates grow with the gradients, and there are none: give a batch and a loss"
        return Skip("whether weights move", reason) if skipped and not judged else None
    worst = max(found, key=lambda one: one.num_unchanged)
    total, unchanged = sum(one.num_elements for one in found), sum(one.num_unchanged for one in found)
    stuck = [name for one in found for name in one.stuck]
    kinds = sorted({one.dtype for one in found})
    return Judgement(
        f"a step leaves {unchanged:,} of {count(total, 'weight')} in {' and '.join(kinds)} as they were",
        evidence={"rate": worst.lr, "num_unchanged": unchanged, "num_stuck_parameters": len(stuck)},
        notes=(
            f"one step on copies, with gradients {run.gradients}, at {run.rate}",
            *([f"no element moves in {count(len(stuck), 'parameter')}: {some(stuck)}"] if stuck else []),
        ),
        help=("keep the weights in float32, or raise the rate",),
        location=Location("optimizer", tensor=stuck[0] if stuck else ""),
    )


def _is_lost(update: UpdateFacts) -> bool:
    return 2 * update.num_unchanged > update.num_elements or bool(update.stuck and not update.depends_on_size)


RULE = Rule("NH330", "update-below-precision", "lost-update", _judge, DryRun, "warning")


def _run(num_unchanged: int, *stuck: str, lr: float = 1e-4, is_sized: bool = False) -> DryRun:
    update = UpdateFacts(0, "bfloat16", lr, 4, 1000, num_unchanged, stuck, depends_on_size=is_sized)
    return DryRun("of a batch", "the highest planned rate", (update,))


FLAGGED = (_run(900), _run(8, "norm.weight"), _run(900, is_sized=True))
CLEAN = (_run(100), _run(1000, lr=0.0), _run(8, "temperature", is_sized=True))
