"""Running a captured step again, exactly or with one thing changed."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from nanhunt.capture.format import Capture, checksum, tensor_paths
from nanhunt.capture.rng import rng_state, set_rng_state
from nanhunt.capture.watch import canonical
from nanhunt.errors import TargetError
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite import tally
from nanhunt.records.steps import Determinism, StepOutcome, Tally
from nanhunt.targets import Target

Batches = list[Any]


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


class Replayer:
    """Runs the step of a capture as often as asked, each time from the captured state.

    Args:
        capture: The saved step.
        target: Builds model, optimizer and loss.
        checkpoint: Weights (name to tensor) to use instead of the captured ones.

    Raises:
        TargetError: If the weights do not fit the model (says which keys).
    """

    def __init__(self, capture: Capture, target: Target, checkpoint: dict[str, Tensor] | None = None) -> None:
        self.capture = capture
        self.target = target
        self.num_steps = 0
        self._weights = checkpoint if checkpoint is not None else capture.payload.get("model")
        self._is_checkpoint = checkpoint is not None
        if self._weights is not None:
            self._load(target.build(0), self._weights)
        if not capture.batches and not capture.payload.get("calls"):
            raise TargetError("the capture holds neither a batch nor the model's inputs", help="capture the step again")
        if capture.batches and not target.has_loss:
            raise TargetError(f"target {target.name} has no loss(model, batch), which this capture needs")

    @property
    def has_weights(self) -> bool:
        """Whether there are weights other than fresh ones."""
        return self._weights is not None

    def run(
        self,
        *,
        change: Change = NO_CHANGE,
        batches: Batches | None = None,
        seed: int | None = None,
        tracer: ExactTracer | None = None,
        look_ahead: bool = False,
    ) -> ReplayedStep:
        """Runs the step once.

        Args:
            change: The one thing to change.
            batches: What to run it on; None for the captured batches.
            seed: Seed of fresh weights and a fresh optimizer; None for the captured ones.
            tracer: Records the step exactly.
            look_ahead: Also run the next forward pass, with the weights the step left.
        """
        self.num_steps += 1
        started = time.perf_counter()
        with _settings(self.capture.meta.get("environment", {})):
            model, optimizer = self._build(seed, change)
            chosen = self.capture.batches if batches is None else batches
            if change.batches is not None:
                chosen = change.batches(chosen)
            if change.dtype is not None:
                chosen = tree_map(lambda leaf: _cast(leaf, change.dtype), chosen)
            if tracer is not None:
                self._declare(tracer, model, optimizer, chosen)
            run = _Run(self, model, optimizer, change, tracer or _NoTracer())
            step = run.all_phases(chosen)
            if look_ahead:
                step.next_outputs, step.next_error = run.next_forward(chosen)
        outcome = step.outcome
        step.outcome = StepOutcome(**{**vars(outcome), "seconds": time.perf_counter() - started})
        return step

    def determinism(self, step: ReplayedStep) -> Determinism:
        """Whether the replayed step has the captured loss and gradients, bit for bit."""
        observed = self.capture.meta.get("observed")
        if observed is None:
            return Determinism("unknown", "the file holds a batch only, nothing to compare with")
        if self._is_checkpoint:
            return Determinism("unknown", "the weights come from the checkpoint, not from the captured step")
        recorded = float.fromhex(observed["loss"]) if observed["loss"] not in ("nan", "inf", "-inf") else float(observed["loss"])
        loss = step.outcome.loss
        if not (loss == recorded or (math.isnan(loss) and math.isnan(recorded))):
            return Determinism("differs", f"loss {loss:.9g}, captured {recorded:.9g}{self._environment_hint()}")
        checksums = observed["gradient_checksums"]
        if not checksums:
            return Determinism("bit-identical", "loss")
        differing = [name for name, value in checksums.items() if step.gradient_checksums.get(name) != value]
        if differing:
            share = f"{len(differing)} of {len(checksums)} gradients, first {differing[0]}"
            return Determinism("differs", f"loss equal, {share}{self._environment_hint()}")
        return Determinism("bit-identical", f"loss and {len(checksums)} of {len(checksums)} gradients")

    def _environment_hint(self) -> str:
        captured = self.capture.meta.get("environment", {})
        if captured.get("torch") != torch.__version__:
            return f" (captured with torch {captured.get('torch')}, replayed with {torch.__version__})"
        return ""

    def _build(self, seed: int | None, change: Change) -> tuple[nn.Module, Optimizer | None]:
        target = change.target or self.target
        model = target.build(0 if seed is None else seed)
        if seed is None and self._weights is not None:
            self._load(model, self._weights)
            _load_named(dict(model.named_buffers()), self.capture.payload.get("buffers_before", {}))
        _set_training(model, self.capture.meta.get("model", {}).get("training", {}))
        if change.dtype is not None:
            model.to(change.dtype)
        optimizer = self.target.optimizer(model) if self.target.has_optimizer else None
        if optimizer is not None and seed is None and "optimizer" in self.capture.payload and not self._is_checkpoint:
            _load_optimizer(optimizer, self.capture.payload["optimizer"], self.target.name)
        if change.model is not None:
            change.model(model)
        if optimizer is not None and change.optimizer is not None:
            optimizer = change.optimizer(model, optimizer)
        self._set_rng(seed)
        return model, optimizer

    def _set_rng(self, seed: int | None) -> None:
        if "rng" in self.capture.payload:
            set_rng_state(self.capture.payload["rng"])
        else:
            torch.manual_seed(0 if seed is None else seed)

    def _load(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        required = set(dict(model.named_parameters()))
        what = "checkpoint" if self._is_checkpoint else "capture"
        missing, unknown = sorted(required - set(weights)), sorted(set(weights) - set(named))
        if missing or unknown:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"unexpected {_some(unknown)}"] if unknown else []
            raise TargetError(
                f"the {what} is of another model than target {self.target.name}: {'; '.join(parts)}",
                help="check --target and --checkpoint",
            )
        for name, value in weights.items():
            if tuple(value.shape) != tuple(named[name].shape):
                raise TargetError(
                    f"the {what} does not fit target {self.target.name}: {name} is {tuple(value.shape)} there, "
                    f"{tuple(named[name].shape)} in the model",
                    help="check --target and its configuration",
                )
        _load_named(named, weights)

    def _declare(self, tracer: ExactTracer, model: nn.Module, optimizer: Optimizer | None, batches: Batches) -> None:
        inputs = batches if batches else [call["args"] for call in self.capture.payload["calls"]]
        tracer.attach(model)
        tracer.declare("batch", [(_batch_name(path), tensor) for path, tensor in tensor_paths(inputs)])
        tracer.declare("parameter", list(model.named_parameters()))
        tracer.declare("buffer", list(model.named_buffers()))
        if optimizer is not None:
            tracer.declare("optimizer state", list(optimizer_tensors(model, optimizer)))


class _Run:
    """One pass through the phases of a step."""

    def __init__(
        self, replayer: Replayer, model: nn.Module, optimizer: Optimizer | None, change: Change, tracer: Any
    ) -> None:
        self.replayer, self.model, self.optimizer, self.change, self.tracer = replayer, model, optimizer, change, tracer
        self.target = replayer.target
        scaler = replayer.capture.payload.get("scaler")
        self.scale = float(scaler["scale"]) if scaler else 1.0

    def all_phases(self, batches: Batches) -> ReplayedStep:
        """Forward, backward, clipping, optimizer step; an exception ends the step and becomes its outcome."""
        result: dict[str, Any] = {"loss": math.nan}
        checksums: dict[str, str] = {}
        phase: Any = "forward"
        around = self.change.around() if self.change.around is not None else contextlib.nullcontext()
        try:
            with self.tracer:
                with around, self._autocast():
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
        except Exception as error:  # noqa: BLE001 - whatever the user's step raises is the outcome to report
            result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip()
            result["failed_phase"] = phase
            if phase == "forward" and _is_misfit(error):
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise TargetError(
                    f"the captured batch does not fit target {self.target.name}: {text}", help="check --target"
                ) from error
        failed = result.pop("failed_phase", None) or self._first_nonfinite_phase(result)
        return ReplayedStep(StepOutcome(**result, failed_phase=failed), self.model, checksums)

    def _losses(self, batches: Batches) -> Iterator[tuple[Any, Any]]:
        """The loss of each micro-step, or the model's outputs with the gradients that were recorded for them."""
        if batches:
            for batch in batches:
                loss = self._loss(batch)
                self.tracer.reached("loss", [("loss", loss.detach())])
                yield loss, None
            return
        for call in self.replayer.capture.payload["calls"]:
            output = self.model(*call["args"], **call["kwargs"])
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.tracer.reached("output", [(f"output {n}", leaf.detach()) for n, leaf in enumerate(outputs)])
            pairs = [(outputs[int(n)], gradient) for n, gradient in call["output_grads"].items()]
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
            norm = float(torch.linalg.vector_norm(torch.stack([g.norm().float() for _, g in named]))) if named else 0.0
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
                    call = self.replayer.capture.payload["calls"][-1]
                    self.model(*call["args"], **call["kwargs"])
        except Exception as raised:  # noqa: BLE001 - a model with NaN weights may raise anything; that is the answer
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"
        finally:
            handle.remove()
        return (tally((f"output {n}", tensor) for n, tensor in enumerate(seen)) if seen else None), error

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        state = self.replayer.capture.meta.get("autocast") or {}
        if not state:
            return contextlib.nullcontext()
        return torch.autocast(state["device"], dtype=getattr(torch, state["dtype"]))

    def _first_nonfinite_phase(self, result: dict[str, Any]) -> Any:
        has_loss = bool(self.replayer.capture.batches)
        if has_loss and not math.isfinite(result["loss"]):
            return "forward"
        if not result["gradients"].is_finite:
            return "backward"
        if not result.get("weights", Tally()).is_finite:
            return "step"
        return None


class _NoTracer(contextlib.nullcontext):  # type: ignore[type-arg]
    """Stands in for the tracer where nothing is traced."""

    def phase(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def reached(self, kind: str, named: Any) -> None:
        return None


def _quiet(tracer: Any) -> contextlib.AbstractContextManager[Any]:
    """Keeps our own looks out of the trace."""
    if isinstance(tracer, ExactTracer):
        return torch.utils._python_dispatch._disable_current_modes()
    return contextlib.nullcontext()


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state as ``exp_avg of encoder.0.weight``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(id(parameter), 'an unnamed parameter')}", value


@contextlib.contextmanager
def _settings(environment: dict[str, Any]) -> Iterator[None]:
    """The captured number of threads; the process's own settings and random numbers are put back afterwards."""
    threads, state = torch.get_num_threads(), rng_state()
    if "num_threads" in environment:
        torch.set_num_threads(int(environment["num_threads"]))
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        set_rng_state(state)


def _load_named(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            if name in into:
                into[name].copy_(value)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any], target: str) -> None:
    try:
        # A copy: the optimizer would otherwise update the captured moments in place.
        optimizer.load_state_dict(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state))
    except (ValueError, KeyError) as error:
        raise TargetError(
            f"the captured optimizer state does not fit target {target}: {error}", help="check --target"
        ) from error


def _set_training(model: nn.Module, flags: dict[str, bool]) -> None:
    model.train()
    for name, module in model.named_modules():
        if name in flags:
            module.training = flags[name]


def _batch_name(path: str) -> str:
    """``batch.windows`` for ``0.windows``; the micro-step stays where it is not the first."""
    first, _, rest = path.partition(".")
    prefix = "batch" if first == "0" else f"batch {first}"
    return f"{prefix}.{rest}" if rest else prefix


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point else leaf


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _is_misfit(error: Exception) -> bool:
    """Whether the step failed because batch and model do not belong together, which is no numerical outcome."""
    text = str(error)
    if isinstance(error, torch.linalg.LinAlgError) or "invalid values" in text or "nan" in text.lower():
        return False
    words = ("shape", "size of tensor", "channels", "must match", "must be a", "expected input", "dimension")
    return isinstance(error, KeyError | TypeError | IndexError) or any(word in text for word in words)
