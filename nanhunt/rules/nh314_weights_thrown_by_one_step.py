"""weights-thrown-by-one-step: one finite but huge gradient threw the weights so far that the next pass overflowed.

What it does:
    Looks at the last optimizer step before an overflow. It holds where the largest weight became a thousand times
    larger in it, to a size that no training has, by a gradient a thousand times that of all steps before, where
    learning rate times gradient is what it became, and where the operation that overflowed was given numbers of such a
    size.

Why it matters:
    The step that is reported and its batch are innocent: the fault is one step back, where loss, gradients and weights
    were all finite.

Use instead:
    A look at the batch of the step before; a clipped gradient norm, which costs nothing in all other steps.

Known limits:
    Adam and its kin divide by the size of the gradient: they are not thrown.
"""

from collections.abc import Sequence

from nanhunt.records.updates import WeightHistory, WeightSample
from nanhunt.rules.optimizer_words import (
    OVERFLOWS,
    is_given_huge,
    is_huge,
    overflow_example,
    sustained_growth,
    weight_samples,
)
from nanhunt.rules.registry import Case, Judgement, Rule

_THROW = 1e3


def _judge(case: Case) -> Judgement | None:
    if case.op is None or not is_given_huge(case) or sustained_growth(case) is not None:
        return None
    for history in case.trace.updates.histories:
        samples = history.before(case.op.step)
        if len(samples) > 1 and is_huge(history) and _is_thrown(samples):
            return _judgement(history, samples[-2], samples[-1])
    return None


def _is_thrown(samples: Sequence[WeightSample]) -> bool:
    """Whether the last step alone did it, by a gradient far beyond all those before."""
    before, after = samples[-2], samples[-1]
    gradient = after.gradient_max or 0.0
    usual = max((sample.gradient_max or 0.0 for sample in samples[:-1]), default=0.0)
    is_leap = 0 < _THROW * before.weight_max < after.weight_max
    is_odd = 0 < _THROW * usual < gradient
    return is_leap and is_odd and 0.5 < (after.lr or 0.0) * gradient / after.weight_max < 2


def _judgement(history: WeightHistory, before: WeightSample, after: WeightSample) -> Judgement:
    return Judgement(
        f"step {after.step} threw {history.parameter} from {before.weight_max:.3g} to {after.weight_max:.3g}:"
        f" lr={after.lr:g} times a gradient of {after.gradient_max:.3g}",
        evidence={
            "thrown_in_step": after.step,
            "weight_max_before": before.weight_max,
            "weight_max": after.weight_max,
            "gradient_max": after.gradient_max,
            "lr": after.lr,
        },
        notes=(f"the fault is in step {after.step}: this one only overflows over its weights",),
        help=(f"look at the batch of step {after.step}", "clip the gradient norm"),
    )


RULE = Rule(
    "NH314",
    "weights-thrown-by-one-step",
    "weights-thrown-by-one-step",
    _judge,
    goes_before=OVERFLOWS,
)

FLAGGED = (overflow_example(weight_samples(1.0, 1.1, 1.0, 1e20)), overflow_example(weight_samples(1.0, 1.0, 2e9)))
CLEAN = (
    overflow_example(weight_samples(1.0, 1.1, 1.0, 1e20), abs_max=90.0),
    overflow_example(weight_samples(1.0, 1.1, 1.0, 1e20, gradients=1e-6)),
    overflow_example(weight_samples(1.0, 1.1, 1.0, 30.0)),
    overflow_example(weight_samples(1e20, 1e20)),
    overflow_example((WeightSample(38, 1.0, 1e20, 1e-22), WeightSample(39, 1e20, 2e20, 0.5))),
    overflow_example(weight_samples(1.0, 1e4, 1e9, 1e20, gradients=2e11)),
)
