"""What an audit of fresh weights measured: layers, activations and parameters, each over several initialisations."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

STEP = 1.1
"""A layer takes part in a change over depth if it changes the scale by at least this factor."""


class Across(NamedTuple):
    """A quantity over the initialisations: smallest, middle and largest."""

    low: float
    middle: float
    high: float


class DepthChange(NamedTuple):
    """How a scale changes over depth: last over first, and how many layers have a part in it."""

    factor: float
    num_layers: int


@dataclass(frozen=True)
class LayerPass:
    """One layer in one pass.

    Attributes:
        input_rms: Root mean square of what it was given; None where that is no floating-point tensor.
        output_rms: Root mean square of what it gave.
        variation: That of the difference from the mean over samples, or over positions of a single sample.
        gradient_norm: Norm of the gradient with respect to the output; None where there is none.
        num_nonfinite: Elements of the output that are NaN or infinite.
        rounding: What rounding alone may make of the variation.
    """

    input_rms: float | None
    output_rms: float
    variation: float | None
    gradient_norm: float | None = None
    num_nonfinite: int = 0
    rounding: float = 0.0

    @property
    def gain(self) -> float | None:
        """Output over input."""
        return self.output_rms / self.input_rms if self.input_rms else None


@dataclass(frozen=True)
class Init:
    """How the weight of a layer was initialised.

    Attributes:
        stds: Standard deviation of the weight, for each initialisation.
        documented_std: What the class documents for these sizes; None where it documents nothing.
        fan_in: Inputs of each unit.
        name: What the weights look like, such as ``default`` or ``xavier gain 0.2``; empty where like nothing known.
    """

    stds: tuple[float, ...]
    documented_std: float | None
    fan_in: float
    name: str = ""

    @property
    def is_zero(self) -> bool:
        """Whether every weight is 0."""
        return all(std == 0.0 for std in self.stds) and self.name == "zeros"

    @property
    def std(self) -> float:
        """The middle one."""
        return statistics.median(self.stds)

    @property
    def gain(self) -> float:
        """What independent inputs of equal size would be multiplied by."""
        return self.std * math.sqrt(self.fan_in)

    @property
    def documented_gain(self) -> float | None:
        """The same of the documented initialisation."""
        return None if self.documented_std is None else self.documented_std * math.sqrt(self.fan_in)


@dataclass(frozen=True)
class LayerAtInit:
    """A layer over the initialisations, in the order in which layers ran first.

    Attributes:
        name: Dotted path.
        kind: Name of its class.
        passes: One for each initialisation.
        init: Of its weight; None for a layer without one, such as a normalisation.
    """

    name: str
    kind: str
    passes: tuple[LayerPass, ...]
    init: Init | None = None

    @property
    def output_rms(self) -> Across:
        """Over the initialisations."""
        return across([one.output_rms for one in self.passes])

    @property
    def variation(self) -> Across | None:
        """Over the initialisations."""
        values = [one.variation for one in self.passes if one.variation is not None]
        return across(values) if values else None

    @property
    def gradient_norm(self) -> Across | None:
        """Over the initialisations, as far as it is finite."""
        norms = [one.gradient_norm for one in self.passes]
        values = [norm for norm in norms if norm is not None and math.isfinite(norm)]
        return across(values) if values else None

    @property
    def num_nonfinite_gradients(self) -> int:
        """Initialisations in which the gradient is NaN or infinite."""
        return sum(one.gradient_norm is not None and not math.isfinite(one.gradient_norm) for one in self.passes)

    @property
    def gain(self) -> Across | None:
        """Output over input, over the initialisations."""
        values = [one.gain for one in self.passes if one.gain is not None]
        return across(values) if values else None


@dataclass(frozen=True)
class ActivationPass:
    """One activation function in one pass.

    Attributes:
        num_observations: Samples times positions: how often each unit was seen.
        num_units: Units.
        num_dead: Units that gave 0 at every observation.
        saturated_share: Share of elements where its slope is next to nothing.
        input_mean: Mean of what it was given.
        input_std: Standard deviation of what it was given.
    """

    num_observations: int
    num_units: int
    num_dead: int = 0
    saturated_share: float = 0.0
    input_mean: float = 0.0
    input_std: float = 0.0


@dataclass(frozen=True)
class ActivationAtInit:
    """An activation function over the initialisations.

    Attributes:
        module: Dotted path of the module that called it.
        op: ``relu``, ``tanh`` or ``sigmoid``.
        after: The layer whose output it was given.
        passes: One for each initialisation.
    """

    module: str
    op: str
    after: str
    passes: tuple[ActivationPass, ...]


@dataclass(frozen=True)
class ParameterAtInit:
    """A parameter over the initialisations.

    Attributes:
        name: Dotted name.
        shape: Its shape.
        num_nonfinite: Elements that are NaN or infinite, the most of any initialisation.
        gradient_norms: For each initialisation; None where the backward pass did not come to it.
        is_zero: Whether it has two axes or more and is 0 throughout.
        still_blocked: Whether it is 0 and its gradient is 0, at first and after a few steps, because of other zeros.
        has_equal_units: Whether all units have the same weights and are given the same gradient.
    """

    name: str
    shape: tuple[int, ...]
    gradient_norms: tuple[float | None, ...]
    num_nonfinite: int = 0
    is_zero: bool = False
    still_blocked: bool = False
    has_equal_units: bool = False


@dataclass(frozen=True)
class InitAudit:
    """A model with fresh weights, run forward and backward on a batch once for each initialisation.

    Attributes:
        num_inits: Initialisations.
        layers: In the order in which they ran first.
        activations: In program order.
        parameters: Those that can be trained.
        outputs: What the model itself gave, for each initialisation.
        input_varies: Whether the samples, or positions, of the batch differ.
        has_backward: Whether there was a backward pass.
    """

    num_inits: int
    layers: tuple[LayerAtInit, ...] = ()
    activations: tuple[ActivationAtInit, ...] = ()
    parameters: tuple[ParameterAtInit, ...] = ()
    outputs: tuple[LayerPass, ...] = ()
    input_varies: bool = True
    has_backward: bool = True

    @property
    def weighted(self) -> tuple[LayerAtInit, ...]:
        """Layers with a weight that is not zero on purpose."""
        return tuple(layer for layer in self.layers if layer.init is not None and not layer.init.is_zero)

    @property
    def has_zero_layers(self) -> bool:
        """Whether the weight of some layer is zero: what lies before it has no gradient at first."""
        return any(parameter.is_zero for parameter in self.parameters)

    @property
    def signal_falls(self) -> tuple[DepthChange, ...]:
        """For each initialisation, how what differs between samples falls over depth."""
        return tuple(fall([one.variation or 0.0 for one in seen]) for seen in self._varying())

    @property
    def certain_signal_falls(self) -> tuple[DepthChange, ...]:
        """The same as far as it can be told from rounding, which beside a large bias is all that differs."""
        return tuple(fall([max(one.variation or 0.0, one.rounding) for one in seen]) for seen in self._varying())

    @property
    def signal_rises(self) -> tuple[DepthChange, ...]:
        """For each initialisation, how the output rises over depth."""
        return tuple(
            rise([layer.passes[number].output_rms for layer in self.weighted]) for number in range(self.num_inits)
        )

    @property
    def gradient_falls(self) -> tuple[DepthChange, ...]:
        """For each initialisation, how the gradient falls from the loss back to the first layer."""
        return tuple(fall(self._gradients(number)) for number in range(self.num_inits))

    @property
    def gradient_rises(self) -> tuple[DepthChange, ...]:
        """For each initialisation, how the gradient rises from the loss back to the first layer."""
        return tuple(rise(self._gradients(number)) for number in range(self.num_inits))

    @property
    def has_finite_gradients(self) -> bool:
        """Whether there was a backward pass, and all gradients are finite."""
        return self.has_backward and not any(layer.num_nonfinite_gradients for layer in self.layers)

    def _varying(self) -> list[list[LayerPass]]:
        """For each initialisation, the layers of which it is known what differs between samples."""
        layers = [layer for layer in self.weighted if all(one.variation is not None for one in layer.passes)]
        return [[layer.passes[number] for layer in layers] for number in range(self.num_inits)]

    def _gradients(self, number: int) -> list[float]:
        """Of one initialisation, from the loss backwards; without the zeros that a zero layer puts before it."""
        found = [layer.passes[number].gradient_norm for layer in reversed(self.weighted)]
        finite = [norm for norm in found if norm is not None and math.isfinite(norm)]
        return [norm for norm in finite if not (norm == 0.0 and self.has_zero_layers)]

    @property
    def is_finite(self) -> bool:
        """Whether weights and outputs are."""
        layers = all(one.num_nonfinite == 0 for layer in self.layers for one in layer.passes)
        return layers and all(parameter.num_nonfinite == 0 for parameter in self.parameters)


def across(values: Sequence[float]) -> Across:
    """Smallest, middle and largest."""
    return Across(min(values), statistics.median(values), max(values))


def fall(values: Sequence[float]) -> DepthChange:
    """How far values fall without coming up again; a small value before a large one does not count."""
    tails = list(accumulate(reversed(values), max))[::-1]
    if not tails or tails[0] <= 0.0:
        return DepthChange(1.0, 0)
    return DepthChange(tails[-1] / tails[0], sum(later * STEP <= earlier for earlier, later in pairwise(tails)))


def rise(values: Sequence[float]) -> DepthChange:
    """How far values rise above the first that is not 0."""
    positive = [value for value in values if value > 0.0]
    heads = list(accumulate(positive, max))
    if not heads:
        return DepthChange(1.0, 0)
    factor = heads[-1] / heads[0] if math.isfinite(heads[-1]) else math.inf
    return DepthChange(factor, sum(later >= STEP * earlier for earlier, later in pairwise(heads)))
