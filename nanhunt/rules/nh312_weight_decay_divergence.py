"""weight-decay-divergence: learning rate times weight decay is above 2, and the weights grew by the factor this gives.

What it does:
    Looks at the steps before an overflow. It holds where the weights kept growing, as in ``diverging-weights``, and
    where in each of the last eight steps the product of learning rate and weight decay was above 2 and the largest
    weight grew by a factor near ``|1 - lr * weight_decay|``.

Why it matters:
    Decay multiplies every weight by ``1 - lr * weight_decay``. A product above 1 turns their sign, one above 2 makes
    them larger in every step whatever the gradients are. No clipping of gradients can help.

Use instead:
    A product of learning rate and weight decay far below 1; usual ones are between 1e-7 and 1e-3.
"""

from collections.abc import Sequence
from itertools import pairwise

from nanhunt.records.updates import WeightSample
from nanhunt.rules.optimizer_words import OVERFLOWS, overflow_example, sustained_growth, weight_samples
from nanhunt.rules.registry import Case, Judgement, Rule

_TOLERANCE = 0.25
_STEPS = 8


def _judge(case: Case) -> Judgement | None:
    growth = sustained_growth(case)
    if growth is None or not _follows_decay(growth.samples):
        return None
    last = growth.samples[-1]
    assert last.lr is not None
    assert last.weight_decay is not None
    product = last.lr * last.weight_decay
    return Judgement(
        f"{growth.text}, {growth.factor:.3g}-fold in each: lr={last.lr:g} times weight_decay={last.weight_decay:g} is"
        f" {product:g}, above 2",
        evidence={
            "lr": last.lr,
            "weight_decay": last.weight_decay,
            "factor_per_step": growth.factor,
            "weight_max": last.weight_max,
            "num_steps": growth.num_steps,
        },
        notes=(f"decay multiplies every weight by 1 - {product:g} = {1 - product:g} in each step",),
        help=("lower the learning rate or the weight decay: their product belongs far below 1",),
    )


def _follows_decay(samples: Sequence[WeightSample]) -> bool:
    """Whether each of the last steps made the weight larger by the factor of its decay, and that factor is above 1."""
    for before, after in pairwise(samples[-_STEPS - 1 :]):
        factor = abs(1 - (after.lr or 0.0) * (after.weight_decay or 0.0))
        ratio = after.weight_max / before.weight_max
        if factor <= 1 or abs(ratio / factor - 1) > _TOLERANCE:
            return False
    return True


RULE = Rule(
    "NH312",
    "weight-decay-divergence",
    "weight-decay-divergence",
    _judge,
    goes_before=OVERFLOWS,
)

_THREEFOLD = [3.0**number for number in range(12, 42)]
FLAGGED = (overflow_example(weight_samples(*_THREEFOLD, lr=2.0, decay=2.0)),)
CLEAN = (
    overflow_example(weight_samples(*_THREEFOLD, lr=2.0, decay=0.1)),
    overflow_example(weight_samples(*_THREEFOLD, lr=6.0, decay=2.0)),
    overflow_example(weight_samples(*_THREEFOLD, lr=2.0, decay=2.0), abs_max=90.0),
    overflow_example(()),
)
