"""What an optimizer was doing: how large the weights had become, and what it had for the elements it spoilt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class WeightSample:
    """One optimizer step of one parameter.

    Attributes:
        step: Step.
        weight_max: Largest absolute value after it.
        gradient_max: Largest absolute value of the gradient it used; None where there was none.
        lr: Learning rate of its group; None for what the first step found.
        weight_decay: Weight decay of its group.
    """

    step: int
    weight_max: float
    gradient_max: float | None = None
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class WeightHistory:
    """The parameter of an optimizer that was largest in the end, over the last steps.

    Attributes:
        optimizer: Name of the optimizer's class.
        parameter: Its name.
        dtype: Its type.
        samples: By step, without gaps.
        maximizes: Whether its group goes up the gradient instead of down.
    """

    optimizer: str
    parameter: str
    dtype: str
    samples: tuple[WeightSample, ...]
    maximizes: bool = False

    def before(self, step: int) -> tuple[WeightSample, ...]:
        """The last samples in a row that are finite and were complete when this step began."""
        found: list[WeightSample] = []
        for sample in reversed(self.samples):
            if sample.step >= step:
                continue
            if not math.isfinite(sample.weight_max):
                break
            found.insert(0, sample)
        return tuple(found)


@dataclass(frozen=True)
class SpoiltElement:
    """The first non-finite element of a tensor that an optimizer step spoilt, and what the step had for it.

    Attributes:
        births: Indices of the operations its non-finite values come from.
        optimizer: Name of the optimizer's class.
        parameter: Name of the parameter it belongs to.
        key: Name of the tensor in the optimizer's state; '' for the parameter itself.
        dtype: Type of that tensor.
        index: Position.
        value: What it became.
        num_nonfinite: Non-finite elements of the tensor.
        num_elements: All of them.
        gradient: The gradient there; None where it could not be read.
        state: The parameter's state after the step: at that position, or the number where it is one.
        settings: The numbers of the parameter's group, such as ``lr``, ``eps`` and ``betas[0]``.
        group: Number of that group.
        step: Step.
    """

    births: tuple[int, ...]
    optimizer: str
    parameter: str
    key: str
    dtype: str
    index: tuple[int, ...]
    value: float
    num_nonfinite: int
    num_elements: int
    gradient: float | None = None
    state: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    group: int = 0
    step: int = 0

    @property
    def name(self) -> str:
        """``exp_avg_sq of 0.weight``, or the parameter's name."""
        return f"{self.key} of {self.parameter}" if self.key else self.parameter

    @property
    def was_given_finite(self) -> bool:
        """Whether the gradient and every number of the group are known and finite."""
        known = self.gradient is not None and math.isfinite(self.gradient)
        return known and all(math.isfinite(value) for value in self.settings.values())

    @property
    def denominator(self) -> tuple[str, float] | None:
        """The second moment whose root the update is divided by, before ``eps`` is added; None if there is none."""
        keys = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum", "exp_inf")
        return next(((key, self.state[key]) for key in keys if key in self.state), None)


@dataclass(frozen=True)
class OptimizerFacts:
    """What was kept of the optimizers of a run."""

    histories: tuple[WeightHistory, ...] = ()
    spoilt: tuple[SpoiltElement, ...] = ()

    def spoilt_by(self, birth: int, step: int) -> tuple[SpoiltElement, ...]:
        """What this operation spoilt in the step it ran in: weights first, then optimizer state."""
        return tuple(element for element in self.spoilt if birth in element.births and element.step == step)
