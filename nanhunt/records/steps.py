"""Outcomes of replayed steps: one step, the grid of weights and batches, and the experiments."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Tally:
    """How many tensors of a kind hold non-finite values, and how many elements."""

    tensors: int = 0
    num_tensors: int = 0
    elements: int = 0
    num_elements: int = 0
    first: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether none does."""
        return self.tensors == 0


@dataclass(frozen=True)
class StepOutcome:
    """What one replayed step gave.

    Attributes:
        loss: The loss; may be non-finite.
        gradients: Parameter gradients after the backward pass, before clipping.
        clipped: The same after clipping; None if the target does not clip.
        weights: Parameters after the optimizer step.
        gradient_norm: Total norm before clipping.
        num_zero_gradients: Gradient tensors that are exactly zero throughout.
        error: The exception that ended the step early, as one line.
        refused_values: Whether that exception is an operation's refusal of non-finite or singular values.
        failed_phase: The first phase that went non-finite or raised; None if the step is finite throughout.
        seconds: Wall time.
    """

    loss: float
    gradients: Tally = field(default_factory=Tally)
    clipped: Tally | None = None
    weights: Tally = field(default_factory=Tally)
    gradient_norm: float = 0.0
    num_zero_gradients: int = 0
    error: str = ""
    refused_values: bool = False
    failed_phase: Literal["forward", "backward", "step"] | None = None
    seconds: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether forward, backward and step all were."""
        return self.failed_phase is None


@dataclass(frozen=True)
class GridCell:
    """One combination of weights and batch.

    Attributes:
        weights: ``captured``, ``checkpoint`` or ``fresh``.
        batch: ``bad`` or ``control``.
        seed: Seed of the fresh weights; None for captured ones.
        outcome: What the step gave.
    """

    weights: Literal["captured", "checkpoint", "fresh"]
    batch: Literal["bad", "control"]
    seed: int | None
    outcome: StepOutcome


@dataclass(frozen=True)
class ExperimentResult:
    """A replay with exactly one thing changed.

    Attributes:
        name: Kebab-case name of the change.
        title: What was changed, for a person.
        family: What kind of explanation it tests: the offending operation, the data, the optimizer, a popular mask.
        outcome: What the step gave; None if the change could not be run.
        skipped: Why it could not be run.
        note: What the outcome does not show, such as gradients that are all zero.
    """

    name: str
    title: str
    family: Literal["offender", "data", "optimizer", "mask", "precision", "model"]
    outcome: StepOutcome | None
    skipped: str = ""
    note: str = ""


@dataclass(frozen=True)
class Determinism:
    """Whether the replay was the captured step, bit for bit."""

    status: Literal["bit-identical", "differs", "unknown"]
    detail: str = ""
