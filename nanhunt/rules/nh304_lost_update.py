"""lost-update: the optimizer steps, and no weight changes.

What it does:
    Compares weights before and after the optimizer step, as far as their gradient is not zero. It holds where none
    changed in four samples in a row, or fewer than a tenth and none of the larger half; where the learning rate is
    above 0, not rising and not yet lowered; and where the gradient is not a remnant of what it was.

Why it matters:
    An update smaller than half the distance to the next number is lost in the addition. bfloat16 has 8 bits: at 1.0 an
    update below 0.002 does nothing, however often it is repeated. The loss stands still while everything looks well.

Use instead:
    Weights in float32 under autocast, an optimizer with master weights or stochastic rounding, a larger learning rate.

Known limits:
    Some elements of up to 64 parameters are compared, not all.
"""

import math
from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.health import Health, StepHealth, UpdateCount
from nanhunt.rules.registry import Judgement, Rule

_SUSTAINED = 4
# Below this number, no change among the larger half may be chance where weights are rounded stochastically.
_MANY = 1000


def _judge(health: Health) -> Judgement | None:
    seen = [step for step in health.steps if step.updates is not None and step.updates.num_watched]
    stuck: list[StepHealth] = []
    for step in reversed(seen):
        assert step.updates is not None
        if not (_is_lost(step.updates) or _is_doubtful(step.updates)):
            break
        stuck.insert(0, step)
    thorough = [step for step in stuck if step.updates is not None and step.updates.is_thorough]
    if len(thorough) < _SUSTAINED or not _should_have_moved(health, thorough):
        return None
    first, last = thorough[0], thorough[-1]
    assert last.updates is not None
    watched, changed = last.updates.num_watched, last.updates.num_changed
    types = sorted({parameter.dtype for parameter in health.parameters})
    return Judgement(
        f"the optimizer changed {changed:,} of {count(watched, 'weight')} with a gradient, in each of"
        f" {count(len(thorough), 'sampled step')}",
        evidence={"lr": last.lr, "num_watched": watched, "num_changed": changed, "dtypes": types},
        notes=("the updates are smaller than half the distance between two numbers of the weights' type",),
        help=("keep the weights in float32, or raise the learning rate",),
        location=Location("optimizer", step=first.step),
    )


def _is_lost(updates: UpdateCount) -> bool:
    if not updates.is_thorough:
        return False
    few = 10 * updates.num_changed < updates.num_watched and updates.num_watched_large >= _MANY
    return updates.num_changed == 0 or (few and updates.num_changed_large == 0)


def _is_doubtful(updates: UpdateCount) -> bool:
    """Whether the few weights that were compared say that a thorough look is worth it, which comes later."""
    return not updates.is_thorough and 2 * updates.num_changed < updates.num_watched


def _should_have_moved(health: Health, stuck: list[StepHealth]) -> bool:
    """Whether the learning rate is at its height, and the gradients are what they were."""
    rates = [step.lr or 0.0 for step in stuck]
    highest = max(step.lr or 0.0 for step in health.steps)
    norms = [step.gradient_norm for step in health.steps[:8] if step.gradient_norm is not None]
    # The last step of a run that ended in a fault has no finite norm, and was not stuck for that.
    norm = next((s.gradient_norm for s in reversed(stuck) if s.gradient_norm and math.isfinite(s.gradient_norm)), 0.0)
    is_steady = rates == sorted(rates, reverse=True) and rates[-1] > 0 and rates[-1] >= highest / 2
    return is_steady and norm > 0.1 * max(norms, default=0.0)


RULE = Rule("NH304", "lost-update", "lost-update", _judge, Health, "warning")


def _run(updates: UpdateCount, *rates: float, norm: float = 1.0) -> Health:
    steps = [StepHealth(step, norm, rate, updates) for step, rate in enumerate(rates)]
    return Health(steps=(StepHealth(0, 1.0, rates[0]), *steps))


_NONE = UpdateCount(64, 0, 32, 0, is_thorough=True)
_ENDED = replace(
    _run(_NONE, *[1e-5] * 4), steps=(*_run(_NONE, *[1e-5] * 4).steps, StepHealth(4, math.nan, 1e-5, _NONE))
)
FLAGGED = (_run(_NONE, *[1e-5] * 4), _ENDED, _run(UpdateCount(9000, 500, 4500, 0, is_thorough=True), *[1e-5] * 5))
CLEAN = (
    _run(_NONE, *[1e-5] * 3),
    _run(_NONE, *[0.0] * 4),
    _run(_NONE, 1e-7, 2e-7, 3e-7, 4e-7),
    _run(_NONE, 1e-3, 1e-5, 1e-5, 1e-5, 1e-5),
    _run(_NONE, *[1e-5] * 4, norm=1e-3),
    _run(UpdateCount(9000, 500, 4500, 9, is_thorough=True), *[1e-5] * 5),
    _run(UpdateCount(64, 0, 0, 0, is_thorough=False), *[1e-5] * 5),
)
