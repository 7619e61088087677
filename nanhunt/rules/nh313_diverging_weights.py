"""diverging-weights: the optimizer made the weights larger step by step, until an operation overflowed.

What it does:
    Looks at the largest weight after each of the last 32 optimizer steps before an overflow. It holds where, from the
    smallest of them on, it grew by a fifth or more per step on average, reached a new height at least four times, and
    never fell below a quarter of one; where that makes a hundredfold even without the largest of the steps, and a size
    that no training has; and where the operation that overflowed was given numbers of such a size.

Why it matters:
    The operation that overflowed is only where it became too much. The weights were lost steps before, and every loss
    until then was finite.

Use instead:
    A smaller learning rate, a warm-up, or a clipped gradient norm. A plain gradient step diverges where the learning
    rate is above 2 over the curvature of the loss: the growth is then much the same factor in every step. With
    ``maximize=True`` any rate does it to a loss: check the sign.

Known limits:
    Updates that are made without an optimizer are not seen, nor is a divergence slower than a fifth per step, nor one
    that takes fewer than four steps.
"""

from nanhunt.rules.optimizer_words import OVERFLOWS, Growth, overflow_example, sustained_growth, weight_samples
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    growth = sustained_growth(case)
    return _judgement(growth) if growth is not None else None


def _judgement(growth: Growth) -> Judgement:
    first, last = growth.samples[0], growth.samples[-1]
    at = f" at lr={last.lr:g}" if last.lr is not None else ""
    rates = [sample.lr for sample in growth.samples[1:] if sample.lr is not None]
    maximizes = growth.history.maximizes
    is_rising = bool(rates) and rates[-1] > min(rates)
    return Judgement(
        f"{growth.text}, {growth.factor:.3g}-fold in each on average{at}",
        evidence={
            "lr": last.lr,
            "factor_per_step": growth.factor,
            "first_weight_max": first.weight_max,
            "weight_max": last.weight_max,
            "gradient_max": last.gradient_max,
            "num_steps": growth.num_steps,
            "first_step": growth.samples[1].step,
        },
        notes=(
            "every loss until then was finite; the operation is only where the size became too much",
            *(("the learning rate was rising at the same time",) if is_rising else ()),
            *(("maximize=True: each step goes up the gradient, so that a loss grows",) if maximizes else ()),
        ),
        help=(
            *(("use maximize=False if this is a loss, or give the step its negative",) if maximizes else ()),
            f"lower the learning rate of {growth.history.optimizer}, or warm it up",
            "clip the gradient norm",
        ),
    )


RULE = Rule("NH313", "diverging-weights", "diverging-weights", _judge, goes_before=OVERFLOWS)

_DOUBLED = [2.0**number for number in range(40, 72)]
FLAGGED = (
    overflow_example(weight_samples(*_DOUBLED)),
    overflow_example(weight_samples(0.5, 0.4, 8.0, 90.0, 1e4, 1e9, 1e19)),
    overflow_example(weight_samples(0.2, 0.8, 3.2, 2.0, 13.0, 52.0, 208.0), abs_max=300.0, dtype="float16"),
)
CLEAN = (
    overflow_example(weight_samples(*_DOUBLED), abs_max=90.0),
    overflow_example(weight_samples(*[2.0**number for number in range(-8, 8)])),
    overflow_example(weight_samples(0.1, 0.13, 0.17, 0.22, 0.3, 1e20)),
    overflow_example(weight_samples(1.0, 30.0, 900.0, 27000.0, 8.0, 1e6, 1e9)),
    overflow_example(weight_samples(1.0, 1e3, 1e9, 1e18)),
    overflow_example(weight_samples(0.25, 1.9, 213.0, 213.0, 1.3e8, 1.3e8)),
    overflow_example(weight_samples(*([1e12] * 20))),
)
