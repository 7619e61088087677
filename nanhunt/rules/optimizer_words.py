"""What the rules for the optimizer step have in common: what it spoilt, what it divided by, how the weights grew."""

import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, Trace, ValueFacts
from nanhunt.records.updates import OptimizerFacts, SpoiltElement, WeightHistory, WeightSample
from nanhunt.rules.registry import Case

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Running sums or means of squared gradients in the state of torch's optimizers."""

MIN_STEPS = 4
MIN_FACTOR = 1.2
MIN_GROWTH = 100.0
MAX_FALL = 4.0

OVERFLOWS = ("NH107", "NH108", "NH109", "NH404")
"""Rules that name the operation that overflowed; what made its input so large says more."""


class Growth(NamedTuple):
    """Weights that kept growing over the last steps."""

    history: WeightHistory
    samples: tuple[WeightSample, ...]

    @property
    def num_steps(self) -> int:
        """Steps over which they grew."""
        return len(self.samples) - 1

    @property
    def total(self) -> float:
        """Last over first."""
        return self.samples[-1].weight_max / self.samples[0].weight_max

    @property
    def factor(self) -> float:
        """By step, in the geometric mean."""
        return float(self.total ** (1 / self.num_steps))

    @property
    def text(self) -> str:
        """From where to where."""
        first, last = self.samples[0].weight_max, self.samples[-1].weight_max
        return f"{self.history.parameter} grew from {first:.3g} to {last:.3g} in {self.num_steps} optimizer steps"


def spoilt(case: Case) -> tuple[SpoiltElement, ...]:
    """What the first offender spoilt in the optimizer step it is part of; nothing where it is elsewhere."""
    if case.op is None or case.op.phase != "optimizer":
        return ()
    return case.trace.updates.spoilt_by(case.op.index, case.op.step)


def is_zero_in(value: float, dtype: str) -> bool:
    """Whether a number is 0 once it is rounded to this type: at most half of its smallest number."""
    return dtype in LIMITS and 2 * abs(value) <= LIMITS[dtype].smallest_subnormal


def divides_by_zero(element: SpoiltElement) -> bool:
    """Whether the root of the second moment plus ``eps`` is exactly 0 there."""
    denominator, eps = element.denominator, element.settings.get("eps")
    return denominator is not None and denominator[1] == 0 and eps is not None and is_zero_in(eps, element.dtype)


def sustained_growth(case: Case) -> Growth | None:
    """The weights that kept growing by a clear factor over the last steps, and are now large enough to overflow."""
    if case.op is None or not is_given_huge(case):
        return None
    grown = [
        Growth(history, samples)
        for history in case.trace.updates.histories
        if is_huge(history) and (samples := _rising(history.before(case.op.step)))
    ]
    return max(grown, key=lambda growth: growth.samples[-1].weight_max, default=None)


def is_huge(history: WeightHistory) -> bool:
    """Whether the last finite weights are far from anything that is trained: above 6e4 in float32, 4 in float16."""
    largest = max((sample.weight_max for sample in history.samples if math.isfinite(sample.weight_max)), default=0.0)
    return history.dtype in LIMITS and largest >= LIMITS[history.dtype].max ** 0.125


def _rising(samples: tuple[WeightSample, ...]) -> tuple[WeightSample, ...]:
    """The samples from the smallest on, if from there the weights grew without much of a fall; else none.

    One leap among small steps is no growth: without the largest of the steps there must be enough of it as well.
    """
    sizes = [sample.weight_max for sample in samples if sample.weight_max > 0]
    found = samples[-len(sizes) + sizes.index(min(sizes)) :] if sizes else ()
    if len(found) <= MIN_STEPS:
        return ()
    sizes = [sample.weight_max for sample in found]
    heights = list(accumulate(sizes, max))
    num_records = sum(later > before for before, later in pairwise(heights))
    if num_records < MIN_STEPS or any(MAX_FALL * size < height for size, height in zip(sizes, heights, strict=True)):
        return ()
    total, leap = sizes[-1] / sizes[0], max(later / before for before, later in pairwise(sizes))
    is_clear = total >= MIN_FACTOR ** (len(sizes) - 1) and total / leap >= MIN_GROWTH
    return found if is_clear else ()


def is_given_huge(case: Case) -> bool:
    """Whether the offender was given numbers so large that the product of a few of them overflows."""
    if case.op is None:
        return False
    if case.op.phase == "optimizer":
        return any(element.was_given_finite for element in spoilt(case))
    operands = case.evidence.operands if case.evidence is not None else ()
    facts = [operand.facts for operand in operands if operand.facts is not None and operand.facts.dtype in LIMITS]
    return any((found.abs_max or 0.0) >= LIMITS[found.dtype].max ** 0.25 for found in facts)


_ELEMENT = SpoiltElement(
    births=(7,),
    optimizer="Adam",
    parameter="head.weight",
    key="",
    dtype="float32",
    index=(0, 1),
    value=math.nan,
    num_nonfinite=3,
    num_elements=8,
    gradient=0.5,
    state={"step": 3.0, "exp_avg": 0.1, "exp_avg_sq": 0.01},
    settings={"lr": 1e-3, "betas[0]": 0.9, "betas[1]": 0.999, "eps": 1e-8, "weight_decay": 0.0},
)


def example(op: str = "aten::addcdiv_", **changed: Any) -> Case:
    """A step of Adam that went wrong, for the examples of rules."""
    element = replace(_ELEMENT, **changed)
    facts = ValueFacts((2, 4), element.dtype, num_nan=3)
    record = OpRecord(7, op, "birth", "optimizer", "", None, outputs=(facts,))
    return Case(record, trace=Trace(9, (record,), updates=OptimizerFacts(spoilt=(element,))))


def overflow_example(samples: tuple[WeightSample, ...], *, abs_max: float = 1e20, dtype: str = "float32") -> Case:
    """A product of the forward pass that overflowed at step 40, after these optimizer steps."""
    facts = ValueFacts((4, 4), dtype, num_posinf=3)
    record = OpRecord(7, "mine::product", "birth", "forward", "head", None, outputs=(facts,), step=40)
    operands = tuple(Operand(name, replace(facts, num_posinf=0, abs_max=abs_max)) for name in ("mat1", "mat2"))
    updates = OptimizerFacts((WeightHistory("SGD", "head.weight", dtype, samples),))
    evidence = OffenderEvidence(3, ((0, 0),), (math.inf,), operands)
    return Case(record, evidence, Trace(9, (record,), updates=updates), step=40)


def weight_samples(
    *sizes: float, lr: float = 0.5, decay: float = 0.0, gradients: float = 2.0
) -> tuple[WeightSample, ...]:
    """Weights of these sizes after the steps up to 39; the gradients are so many times the weights."""
    first = 40 - len(sizes)
    return tuple(WeightSample(first + number, size, gradients * size, lr, decay) for number, size in enumerate(sizes))
