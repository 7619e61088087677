"""One step run in several ways, and what each of them gave."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """How far two runs of one step lie apart, where both are finite.

    Attributes:
        name: The tensor that lies farthest apart, such as ``gradient of head.weight``.
        absolute: The largest difference between two elements of it.
        relative: The same over the largest element of its kind: outputs, loss or gradients.
    """

    name: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class StepRun:
    """One way to run a step.

    Attributes:
        name: eager code, compiled code or float64.
        loss: Its value; None if the step did not come that far.
        num_outputs: Tensors that the model gave out.
        num_gradients: Gradients that the step left behind.
        nonfinite: What of outputs, loss and gradients is not finite.
        harmed: What of it does harm; outputs do where no loss says what becomes of them.
        difference: The farthest it lies from float64; None where there is nothing to compare.
        error: How the step ended, if it raised.
        skipped: Why it was not run, or was not compiled.
    """

    name: str
    loss: float | None = None
    num_outputs: int = 0
    num_gradients: int = 0
    nonfinite: tuple[str, ...] = ()
    harmed: tuple[str, ...] = ()
    difference: Difference | None = None
    error: str = ""
    skipped: str = ""

    @property
    def has_fault(self) -> bool:
        """Whether a non-finite value did harm, or the step raised."""
        return bool(self.harmed or self.error)
