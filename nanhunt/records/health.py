"""What the health probe saw of a run: magnitudes at sampled steps, before anything is non-finite."""

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["input", "output", "input_gradient", "output_gradient"]


@dataclass(frozen=True)
class Extent:
    """Smallest and largest value of the tensors in one place, and their element type."""

    low: float
    high: float
    dtype: str

    @property
    def magnitude(self) -> float:
        """Largest absolute value; NaN if there was one."""
        return max(-self.low, self.high)

    @property
    def is_finite(self) -> bool:
        """Whether every value was."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def unmasked(self) -> float:
        """The magnitude without a mask: where the negative side alone is large, that of the positive side."""
        return self.high if self.high >= 0 and -self.low > 8 * self.high else self.magnitude


@dataclass(frozen=True)
class ModuleSample:
    """One sampled step of a module; the extremes over all its calls. None where no tensor was seen."""

    step: int
    input: Extent | None = None
    output: Extent | None = None
    input_gradient: Extent | None = None
    output_gradient: Extent | None = None

    @property
    def gain(self) -> float | None:
        """Output over input magnitude; over 1 where the input holds no floating-point numbers."""
        if self.output is None or not self.output.is_finite:
            return None
        return _ratio(self.output.unmasked, self.input.magnitude if self.input is not None else 1.0)

    @property
    def gradient_gain(self) -> float | None:
        """Magnitude of the gradient that left at the input over that which came to the output."""
        if self.input_gradient is None or self.output_gradient is None:
            return None
        return _ratio(self.input_gradient.magnitude, self.output_gradient.magnitude)


@dataclass(frozen=True)
class ModuleHealth:
    """A module over the sampled steps.

    Attributes:
        name: Dotted path.
        kind: Name of its class.
        samples: By step; the first ones are all kept, later ones thinned out.
    """

    name: str
    kind: str
    samples: tuple[ModuleSample, ...]

    def at(self, step: int) -> ModuleSample | None:
        """The sample of this step."""
        return next((sample for sample in self.samples if sample.step == step), None)


@dataclass(frozen=True)
class ParameterSample:
    """The gradient of a parameter as the optimizer was about to use it.

    Attributes:
        step: Step.
        abs_max: Largest absolute value.
        zero_share: Share of elements that are exactly zero; None where it was not counted.
        subnormal_share: Share of elements that are subnormal; None where it was not counted.
    """

    step: int
    abs_max: float
    zero_share: float | None = None
    subnormal_share: float | None = None


@dataclass(frozen=True)
class ParameterHealth:
    """A parameter's gradient over the sampled steps."""

    name: str
    dtype: str
    num_elements: int
    samples: tuple[ParameterSample, ...]

    @property
    def module(self) -> str:
        """Path of the owning module."""
        return self.name.rpartition(".")[0]

    def at(self, step: int) -> ParameterSample | None:
        """The sample of this step."""
        return next((sample for sample in self.samples if sample.step == step), None)


@dataclass(frozen=True)
class UpdateCount:
    """How many of the weights looked at moved in an optimizer step.

    Attributes:
        num_watched: Elements looked at whose gradient was not zero.
        num_changed: How many of them have another value after the step.
        num_watched_large: Those of them at least as large as the median of their tensor.
        num_changed_large: How many of these changed.
        is_thorough: Whether elements of all parameters were among them, not only of a few.
    """

    num_watched: int
    num_changed: int
    num_watched_large: int
    num_changed_large: int
    is_thorough: bool


@dataclass(frozen=True)
class StepHealth:
    """One sampled step.

    Attributes:
        step: Step.
        gradient_norm: Total norm as the optimizer was about to use the gradients; None if no optimizer step was seen.
        lr: Largest learning rate of the parameter groups.
        updates: What the optimizer step changed.
    """

    step: int
    gradient_norm: float | None = None
    lr: float | None = None
    updates: UpdateCount | None = None


@dataclass(frozen=True)
class InfiniteMoment:
    """A second moment of an optimizer that holds infinities while the weights are finite.

    Attributes:
        parameter: Name of the parameter it belongs to.
        key: Its name in the optimizer's state, such as ``exp_avg_sq``.
        step: The step after which it was seen first.
        last_finite_step: The last step after which the moments were looked at and finite.
        num_infinite: Elements at infinity.
        num_elements: All elements.
        first_index: Index of the first infinite element.
    """

    parameter: str
    key: str
    step: int
    last_finite_step: int | None
    num_infinite: int
    num_elements: int
    first_index: tuple[int, ...]


@dataclass(frozen=True)
class ScaleSample:
    """The loss scale after a step, and whether the scaler skipped that step."""

    step: int
    scale: float
    is_skipped: bool


@dataclass(frozen=True)
class Health:
    """Everything the health probe kept of a run.

    Attributes:
        modules: In the order in which their forward began first.
        parameters: In the optimizer's order.
        steps: Sampled steps.
        moments: Second moments at infinity.
        scales: The first loss scale and every change of it, thinned out.
        num_steps: Steps begun.
        problems: Failures of the probe itself, one line each.
    """

    modules: tuple[ModuleHealth, ...] = ()
    parameters: tuple[ParameterHealth, ...] = ()
    steps: tuple[StepHealth, ...] = ()
    moments: tuple[InfiniteMoment, ...] = ()
    scales: tuple[ScaleSample, ...] = ()
    num_steps: int = 0
    problems: tuple[str, ...] = ()

    def position(self, module: str) -> int | None:
        """Place of a module in program order."""
        return next((place for place, seen in enumerate(self.modules) if seen.name == module), None)

    def siblings(self, module: ModuleHealth) -> tuple[ModuleHealth, ...]:
        """Modules of the same class and relative name in other elements of the same numbered container."""
        pattern = _without_numbers(module.name)
        if pattern == module.name:
            return ()
        alike = [other for other in self.modules if other.kind == module.kind and other.name != module.name]
        return tuple(other for other in alike if _without_numbers(other.name) == pattern)

    def largest(self, role: Role, step: int) -> float:
        """Largest finite magnitude of any module in this role; 0 if there is none."""
        samples = [module.at(step) for module in self.modules]
        extents = [getattr(sample, role) for sample in samples if sample is not None]
        return max((extent.magnitude for extent in extents if extent is not None and extent.is_finite), default=0.0)


def _ratio(value: float, base: float) -> float | None:
    return value / base if base > 0 and math.isfinite(base) and math.isfinite(value) else None


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
