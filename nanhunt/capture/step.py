"""One pass through a step: forward, backward, clipping, optimizer, with at most one thing changed."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nanhunt.capture.format import Capture, checksum
from nanhunt.capture.watch import canonical
from nanhunt.errors import TargetError, first_line
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite import tally
from nanhunt.observe.modes import untraced
from nanhunt.observe.values import optimizer_tensors
from nanhunt.records.steps import StepOutcome, Tally
from nanhunt.targets import Target

Batches = list[Any]

_PLAIN = (
    "captures hold plain containers: a named tuple comes back as a tuple; take it by position in loss(model, batch)"
)

# What operations say when they refuse values; as whole words, for "dominant" holds a "nan".
_REFUSAL = re.compile(r"\b(nans?|inf|infinity|invalid values|(non-?)?finite|singular)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """The one thing an experiment changes; every field that is None leaves the step as it was.

    Attributes:
        name: Kebab-case name.
        title: For a person.
        family: What kind of explanation it tests.
        batches: Gives the batches to use instead.
        around: A context in which forward and backward run.
        model: Changes the model after its weights are in place, for instance with hooks.
        gradients: Changes the gradients before clipping.
        optimizer: Gives the optimizer to use instead.
        target: A variant of the target that takes the same weights.
        dtype: Floating-point type of weights and batches.
        note: What a finite outcome does not show.
    """

    name: str
    title: str
    family: Literal["offender", "data", "optimizer", "mask", "precision", "model"]
    batches: Callable[[Batches], Batches] | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    model: Callable[[nn.Module], None] | None = None
    gradients: Callable[[nn.Module], None] | None = None
    optimizer: Callable[[nn.Module, Optimizer], Optimizer] | None = None
    target: Target | None = None
    dtype: torch.dtype | None = None
    note: str = ""


NO_CHANGE = Change("none", "nothing", "model")


@dataclass
class ReplayedStep:
    """What is left of a step after it ran: its outcome, and the model to go on with."""

    outcome: StepOutcome
    model: nn.Module
    gradient_checksums: dict[str, str] = field(default_factory=dict)
    next_outputs: Tally | None = None
    next_error: str = ""


class StepRun:
    """One pass through the phases of a step."""

    def __init__(
        self,
        capture: Capture,
        target: Target,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        change: Change = NO_CHANGE,
        tracer: ExactTracer | None = None,
    ) -> None:
        self.capture, self.target = capture, target
        self.model, self.optimizer, self.change = model, optimizer, change
        self.tracer: Any = tracer or _NoTracer()
        scaler = capture.payload.get("scaler")
        self.scale = float(scaler["scale"]) if scaler else 1.0

    def all_phases(self, batches: Batches) -> ReplayedStep:
        """Forward, backward, clipping, optimizer step; an exception ends the step and becomes its outcome."""
        result: dict[str, Any] = {"loss": math.nan}
        checksums: dict[str, str] = {}
        phase: Any = "forward"
        around = self.change.around() if self.change.around is not None else contextlib.nullcontext()
        try:
            with self.tracer:
                with around:
                    result["loss"] = 0.0
                    for loss, seed_gradients in self._losses(batches):
                        phase = "backward"
                        result["loss"] += float(loss.detach()) if seed_gradients is None else math.nan
                        self._backward(loss, seed_gradients)
                        phase = "forward"
                phase = "backward"
                result |= self._after_backward()
                phase = "step"
                result |= self._step(checksums)
        except TargetError:
            raise
        except Exception as error:
            if phase == "forward" and self.change is NO_CHANGE and not self._refuses_values(error):
                raise TargetError(
                    f"the captured batch does not fit target {self.target.name}: {first_line(error)}",
                    help=_PLAIN
                    if re.match(r"'(tuple|list|dict)' object has no attribute", str(error))
                    else "check --target",
                ) from error
            if phase == "forward":
                result["loss"] = math.nan
            result["error"] = f"{type(error).__name__}: {first_line(error)}"
            result["failed_phase"] = phase
            result["refused_values"] = self._refuses_values(error)
        failed = result.pop("failed_phase", None) or self._first_nonfinite_phase(result)
        return ReplayedStep(StepOutcome(**result, failed_phase=failed), self.model, checksums)

    def _refuses_values(self, error: Exception) -> bool:
        """Whether an operation refused non-finite or singular values, which is an outcome.

        Anything else that a forward pass raises says that batch and model do not belong together: the captured step got
        through it, unless it is recorded that it did not.
        """
        crashed = bool(self.capture.meta.get("observed", {}).get("crash"))
        return isinstance(error, torch.linalg.LinAlgError) or crashed or bool(_REFUSAL.search(str(error)))

    def _losses(self, batches: Batches) -> Iterator[tuple[Any, Any]]:
        """The loss of each micro-step, or the model's outputs with the gradients that were recorded for them."""
        if batches:
            for batch in batches:
                with self._autocast():
                    loss = self._loss(batch)
                self.tracer.reached("loss", [("loss", loss.detach())])
                yield loss, None
            return
        for call in self.capture.payload["calls"]:
            with self._autocast():
                output = self.model(*call["args"], **call["kwargs"])
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.tracer.reached("output", [(f"output {n}", leaf.detach()) for n, leaf in enumerate(outputs)])
            pairs = [(outputs[int(n)], gradient) for n, gradient in call["output_grads"].items()]
            for number, gradient in call["output_grads"].items():
                # What the loss made of the outputs is not in the capture: only its gradients are.
                self.tracer.declare_result(f"gradient of output {number}", gradient, outputs)
            yield [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]

    def _loss(self, batch: Any) -> Tensor:
        target = self.change.target or self.target
        loss = target.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TargetError(f"the loss of target {target.name} is not a single number")
        return loss

    def _backward(self, loss: Any, seed_gradients: Any) -> None:
        with self.tracer.phase("backward"):
            if seed_gradients is None:
                (loss * self.scale if self.scale != 1.0 else loss).backward()
            elif loss:
                torch.autograd.backward(loss, seed_gradients)

    def _after_backward(self) -> dict[str, Any]:
        named = self._gradients()
        if self.scale != 1.0:
            torch._foreach_mul_([gradient for _, gradient in named], 1.0 / self.scale)
        if self.change.gradients is not None:
            self.change.gradients(self.model)
            named = self._gradients()
        self.tracer.reached("gradient", named)
        with torch.no_grad(), _quiet(self.tracer):
            # In float64: squares of large float32 gradients overflow where the gradients do not.
            norms = [_wide(gradient).norm() for _, gradient in named]
            norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
            zero = sum(1 for _, gradient in named if not bool(gradient.any()))
        with _quiet(self.tracer):
            counted = tally(named)
        return {"gradients": counted, "gradient_norm": norm, "num_zero_gradients": zero}

    def _step(self, checksums: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.target.max_grad_norm is not None:
            with self.tracer.phase("clip"):
                nn.utils.clip_grad_norm_(self.model.parameters(), self.target.max_grad_norm)
            with _quiet(self.tracer):
                found["clipped"] = tally(self._gradients())
        with _quiet(self.tracer):
            checksums.update({name: checksum(canonical(gradient)) for name, gradient in self._gradients()})
        if self.optimizer is not None:
            with self.tracer.phase("optimizer"):
                self.optimizer.step()
            self.tracer.reached("parameter", [(name, p.detach()) for name, p in self.model.named_parameters()])
            self.tracer.reached("optimizer state", list(optimizer_tensors(self.model, self.optimizer)))
            with _quiet(self.tracer):
                found["weights"] = tally((name, p.detach()) for name, p in self.model.named_parameters())
        self.tracer.reached("buffer", list(self.model.named_buffers()))
        return found

    def next_forward(self, batches: Batches) -> tuple[Tally | None, str]:
        """How much of the model's output is non-finite in the forward pass after the step."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen.extend(leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

        handle = self.model.register_forward_hook(note)
        error = ""
        try:
            with torch.no_grad(), self._autocast():
                if batches:
                    self.target.loss(self.model, batches[-1])
                else:
                    call = self.capture.payload["calls"][-1]
                    self.model(*call["args"], **call["kwargs"])
        except Exception as raised:  # noqa: BLE001 - a model with NaN weights may raise anything; that is the answer
            error = f"{type(raised).__name__}: {first_line(raised)}"
        finally:
            handle.remove()
        return (tally((f"output {n}", tensor) for n, tensor in enumerate(seen)) if seen else None), error

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        state = self.capture.meta.get("autocast") or {}
        if not state:
            return contextlib.nullcontext()
        return torch.autocast(state["device"], dtype=getattr(torch, state["dtype"]))

    def _first_nonfinite_phase(self, result: dict[str, Any]) -> Any:
        has_loss = bool(self.capture.batches)
        if has_loss and not math.isfinite(result["loss"]):
            return "forward"
        if not result["gradients"].is_finite:
            return "backward"
        if not result.get("weights", Tally()).is_finite:
            return "step"
        return None


class _NoTracer(contextlib.nullcontext[None]):
    """Stands in for the tracer where nothing is traced."""

    def phase(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def reached(self, kind: str, named: Any) -> None:
        return None

    def declare_result(self, name: str, tensor: Tensor, causes: Any) -> None:
        return None


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.complex128 if gradient.is_complex() else torch.float64)


def _quiet(tracer: Any) -> contextlib.AbstractContextManager[Any]:
    """Keeps our own looks out of the trace."""
    if isinstance(tracer, ExactTracer):
        return untraced()
    return contextlib.nullcontext()
