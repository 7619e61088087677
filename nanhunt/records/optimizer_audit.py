"""What the audit of an optimizer measured: groups, parameters, one step on copies, the schedule, the stored state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["norm gain", "norm bias", "bias", "embedding", "1-d", "matrix", "other"]
"""What a parameter does, told by the type of its module; ``other`` stands in a module of no known type."""

Decay = Literal["none", "direct", "through the gradient", "unknown"]
"""``direct``: a step multiplies the weight by 1 - rate x decay where its gradient is 0."""

Gradients = Literal["of a batch", "stored", "of unit size", "as the second moments say"]
"""Where the gradients of a step on copies come from."""


@dataclass(frozen=True)
class GroupFacts:
    """A parameter group.

    Attributes:
        index: Its place.
        lr: Learning rate as it stands; None where the optimizer finds one by itself.
        weight_decay: Weight decay; 0 where the optimizer has none.
        settings: Every other number of the group, by name, such as ``eps`` and ``betas.0``.
        num_parameters: Tensors in it.
        num_elements: Weights in it.
        decay: How the decay acts, measured.
        peak_lr: Highest rate within the planned steps.
        kept_share: What the planned steps leave of a weight that has no gradient; None where the decay is not direct.
    """

    index: int
    lr: float | None
    weight_decay: float = 0.0
    settings: dict[str, float] = field(default_factory=dict)
    num_parameters: int = 0
    num_elements: int = 0
    decay: Decay = "none"
    peak_lr: float = 0.0
    kept_share: float | None = None


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter of the model, or a tensor that only the optimizer holds.

    Attributes:
        name: Dotted path; empty for a tensor that is not the model's.
        module: Class of the owning module.
        role: What it does.
        inferred: What the role was told from, where it is not the module's type alone.
        shape: Shape.
        dtype: Element type.
        requires_grad: Whether it is trained.
        groups: The groups it is in, once for each time it is in one.
        has_gradient: Whether a gradient is stored, or a step gave one; None where nobody knows.
        asks_no_decay: Whether it carries a mark that asks to be spared from weight decay.
        held_elsewhere: Whether another of the optimizers that were given holds it.
    """

    name: str
    module: str = ""
    role: Role = "matrix"
    inferred: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    requires_grad: bool = True
    groups: tuple[int, ...] = ()
    has_gradient: bool | None = None
    asks_no_decay: bool = False
    held_elsewhere: bool = False


@dataclass(frozen=True)
class GroupSettings:
    """The numbers of an optimizer's groups."""

    optimizer: str
    groups: tuple[GroupFacts, ...]


@dataclass(frozen=True)
class OptimizerSetup:
    """An optimizer and the model it is to train.

    Attributes:
        optimizer: Its class.
        groups: Its groups.
        parameters: The model's parameters.
        foreign: Tensors in the groups that are not the model's.
        num_steps: Planned steps.
        steps_from: Where that number comes from.
        num_optimizers: Optimizers that were given, this one among them.
    """

    optimizer: str
    groups: tuple[GroupFacts, ...]
    parameters: tuple[ParameterFacts, ...] = ()
    foreign: tuple[ParameterFacts, ...] = ()
    num_steps: int = 10_000
    steps_from: str = "if the rate stays"
    num_optimizers: int = 1

    def decayed(self, *roles: Role) -> tuple[ParameterFacts, ...]:
        """Trainable parameters of these roles, by default of all, in a group with weight decay."""
        return tuple(
            parameter
            for parameter in self.parameters
            if (not roles or parameter.role in roles) and parameter.requires_grad and self.decay_of(parameter) > 0
        )

    def decay_of(self, parameter: ParameterFacts) -> float:
        """The largest weight decay that acts on a parameter."""
        return max((self.groups[index].weight_decay for index in parameter.groups), default=0.0)

    def decay_notes(self, parameters: Sequence[ParameterFacts]) -> tuple[str, ...]:
        """What the planned decay does to these parameters, and what it cannot do."""
        groups = [self.groups[index] for index in sorted({index for one in parameters for index in one.groups})]
        product = max((one.peak_lr * one.weight_decay for one in groups if one.decay == "direct"), default=0.0)
        if product > 1:
            return (f"rate x weight decay is {product:.4g}: diverging-weight-decay says what that does",)
        if any(group.decay == "unknown" for group in groups):
            return (f"how {self.optimizer} applies its decay is not known: no step on copies could tell",)
        kept = [group.kept_share for group in groups if group.kept_share is not None]
        when = f"after {self.num_steps:,} steps ({self.steps_from})"
        if not kept:
            effect = f"{self.optimizer} adds the decay to the gradient, so it shrinks them by no fixed factor"
        else:
            effect = f"where the gradient is 0, {min(kept):.4g} of the value is left {when}"
        return effect, "this is hygiene: it cannot by itself make a value NaN or infinite"


@dataclass(frozen=True)
class ProbeStep:
    """One step of the optimizer's settings on a few numbers, from a fresh state.

    Attributes:
        group: The group whose settings they are.
        dtype: Type of the numbers.
        eps: The group's ``eps``; None where it has none.
        num_parameters: Parameters of this type in the group.
        bad_gradients: Gradients, of those that the type holds, with which a weight of 1 became non-finite; the
            largest one is sought until it is known to within a percent.
    """

    group: int
    dtype: str
    eps: float | None
    num_parameters: int
    bad_gradients: tuple[float, ...] = ()


@dataclass(frozen=True)
class UpdateFacts:
    """What one step on copies changed in the parameters of one group and type.

    Attributes:
        group: Group.
        dtype: Element type.
        lr: Rate of the step.
        num_parameters: Tensors that were stepped.
        num_elements: Their elements with a gradient other than 0.
        num_unchanged: How many of these have the value they had.
        stuck: Parameters of which no element changed though it had a gradient.
        num_nonfinite: Elements that became non-finite though they and their gradients were finite.
        first_nonfinite: The parameter with the first of these.
        depends_on_size: Whether the update grows with the gradient.
        change_norm: Norm of the change.
        weight_norm: Norm of the weights before.
        largest_change: Largest change of one element, without what the decay takes; 0 where nothing finite changed.
        largest_weight: Largest absolute value of an element before.
    """

    group: int
    dtype: str
    lr: float
    num_parameters: int
    num_elements: int
    num_unchanged: int = 0
    stuck: tuple[str, ...] = ()
    num_nonfinite: int = 0
    first_nonfinite: str = ""
    depends_on_size: bool = False
    change_norm: float = 0.0
    weight_norm: float = 0.0
    largest_change: float = 0.0
    largest_weight: float = 0.0


@dataclass(frozen=True)
class DryRun:
    """One optimizer step on copies of the parameters.

    Attributes:
        gradients: Where its gradients came from.
        rate: In words, which rate it ran at.
        updates: What changed, by group and type.
        max_norm: Total norm the gradients were clipped to before; None where nobody clips, or nobody says so.
        says_clipping: Whether it is known that nobody does.
    """

    gradients: Gradients
    rate: str
    updates: tuple[UpdateFacts, ...]
    max_norm: float | None = None
    says_clipping: bool = False

    @property
    def moved_by(self) -> float | None:
        """Norm of the change of all weights over their norm; None where they are all 0, or anything is non-finite."""
        change = math.hypot(*(update.change_norm for update in self.updates))
        size = math.hypot(*(update.weight_norm for update in self.updates))
        return change / size if 0 < size < math.inf and math.isfinite(change) else None


@dataclass(frozen=True)
class PlannedRates:
    """The highest planned rate of each group, and whether the schedule knows all groups.

    Attributes:
        kind: Class of the schedule; empty without one.
        num_steps: Planned steps.
        peaks: The highest rate of each group; None where nobody knows it.
        num_trained: Trainable parameters in each group.
        num_scheduled: Groups that the schedule has rates for; None where it does not say, or there is none.
        failure: What a step of the schedule raises; empty if nothing.
    """

    kind: str
    num_steps: int
    peaks: tuple[float | None, ...]
    num_trained: tuple[int, ...]
    num_scheduled: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class ScheduleCurve:
    """The learning rate of a group over the planned steps.

    Attributes:
        kind: Class of the schedule.
        num_steps: Planned steps.
        samples: Step and rate, by step; the first one, the peak and the last one are among them.
        given_lr: The rate that the optimizer was made with.
        peak_step: First step at the highest rate.
        said_warmup: How long the warm-up is said to be; None where nobody says.
        num_idle: Steps whose rate moves no weight of typical size; None where the update depends on the gradient.
        typical_weight: Median of the absolute values of the weights.
        dtype: Type of most weights.
        is_own: Whether it drives this optimizer.
        is_planned: Whether the number of steps was given or is the schedule's own.
        start: The first step that is known; above 0 for a schedule under way that cannot be asked for earlier ones.
        group: The group.
        num_groups: Groups of the optimizer.
    """

    kind: str
    num_steps: int
    samples: tuple[tuple[int, float], ...]
    given_lr: float
    peak_step: int
    said_warmup: int | None = None
    num_idle: int | None = None
    typical_weight: float = 0.0
    dtype: str = "float32"
    is_own: bool = True
    is_planned: bool = True
    start: int = 0
    group: int = 0
    num_groups: int = 1

    @property
    def whose(self) -> str:
        """`` in group 1`` where there is more than one."""
        return f" in group {self.group}" if self.num_groups > 1 else ""

    @property
    def peak(self) -> float:
        """The highest rate."""
        return max(rate for _, rate in self.samples)

    def at(self, step: int) -> float | None:
        """The rate at a step, if it was sampled."""
        return next((rate for place, rate in self.samples if place == step), None)


@dataclass(frozen=True)
class Clipping:
    """Clipping by total norm, tried on copies of the gradients.

    Attributes:
        max_norm: The largest norm it lets pass.
        norm: Total norm of the gradients, in float64; NaN or infinite where they are.
        num_tensors: Gradients.
        num_nonfinite: How many of them hold a non-finite value.
        num_nonfinite_after: How many do once they are clipped.
        num_zeroed: How many hold nothing but zeros once they are clipped, and held something else before.
        scale: The loss scale that is still in the gradients; None where there is none, or it was taken out.
    """

    max_norm: float
    norm: float
    num_tensors: int
    num_nonfinite: int = 0
    num_nonfinite_after: int = 0
    num_zeroed: int = 0
    scale: float | None = None


@dataclass(frozen=True)
class StateFacts:
    """One tensor of an optimizer's state.

    Attributes:
        parameter: Name of the parameter, or its number where the names are not known.
        key: Its name in the state, such as ``exp_avg_sq``.
        dtype: Element type.
        shape: Shape.
        expected_dtype: That of the parameter; empty where it is not known or need not agree.
        expected_shape: That of the parameter; None where it is not known or need not agree.
        num_elements: Elements.
        num_nan: NaN elements.
        num_inf: Infinite elements.
        num_negative: Negative elements.
        first_index: Index of the first element counted in one of these, negative ones for second moments only.
        is_second_moment: Whether it is a mean, sum or maximum of squares or sizes.
    """

    parameter: str
    key: str
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    expected_dtype: str = ""
    expected_shape: tuple[int, ...] | None = None
    num_elements: int = 1
    num_nan: int = 0
    num_inf: int = 0
    num_negative: int = 0
    first_index: tuple[int, ...] = ()
    is_second_moment: bool = False

    @property
    def what(self) -> str:
        """``exp_avg_sq of head.weight``."""
        return f"{self.key} of {self.parameter}"


@dataclass(frozen=True)
class StoredState:
    """The state of an optimizer, from a file or as it stands.

    Attributes:
        origin: ``the file`` or ``the optimizer``.
        entries: Its tensors.
        num_parameters: Parameters in the groups.
        num_with_state: How many of them have an entry.
        unknown: State of parameters that are in no group.
        without: Parameters that have a gradient but no state, while others have some.
        num_expected: Parameters in the groups of the target's optimizer; None without a target.
        step: Steps that the file says were taken; None where it does not say.
        steps: Smallest and largest step count of the parameters; None where they have none.
        keeps_state: Whether this kind of optimizer keeps any; None where nobody knows.
    """

    origin: str
    entries: tuple[StateFacts, ...] = ()
    num_parameters: int = 0
    num_with_state: int = 0
    unknown: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    num_expected: int | None = None
    step: int | None = None
    steps: tuple[float, float] | None = None
    keeps_state: bool | None = None


@dataclass(frozen=True)
class SettingsComparison:
    """The settings of the groups in a file that are not the target's: name with group, in the file, in the target."""

    differing: tuple[tuple[str, object, object], ...] = ()


@dataclass(frozen=True)
class StoredWeights:
    """The weights in a file: how many tensors, and those that hold non-finite values."""

    num_tensors: int
    bad: tuple[str, ...] = ()


def some(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 14 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
