"""Running a captured step again, exactly or with one thing changed."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from nanhunt.capture.environment import differences
from nanhunt.capture.format import Capture, tensor_paths
from nanhunt.capture.rng import rng_state, set_rng_state
from nanhunt.capture.step import NO_CHANGE, Batches, Change, ReplayedStep, StepRun
from nanhunt.errors import TargetError
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.values import optimizer_tensors
from nanhunt.records.steps import Determinism
from nanhunt.targets import Target

_DEFAULT_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


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
        self.capture = _boundary(capture) if not target.has_loss else capture
        self.target = target
        self.num_steps = 0
        self._weights = checkpoint if checkpoint is not None else capture.payload.get("model")
        self._is_checkpoint = checkpoint is not None
        if self._weights is not None:
            with _settings(capture.meta.get("environment", {})):
                self._load(target.build(0), self._weights)
        if not self.capture.batches and not capture.payload.get("calls"):
            raise TargetError("the capture holds neither a batch nor the model's inputs", help="capture the step again")
        if not self.capture.batches and not _has_way_back(self.capture):
            raise TargetError(
                "the capture holds no gradient of the model's outputs to go back from",
                help="give a target with loss(model, batch), or a model whose outputs are tensors, lists or dicts",
            )
        if self.capture.batches and not target.has_loss:
            raise TargetError(f"target {target.name} has no loss(model, batch), which this capture needs")

    @property
    def weights_name(self) -> Literal["captured", "checkpoint"] | None:
        """Where the weights come from; None if only fresh ones can be had."""
        if self._weights is None:
            return None
        return "checkpoint" if self._is_checkpoint else "captured"

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
        if batches is not None and not self.target.has_loss:
            raise TargetError(f"target {self.target.name} has no loss(model, batch) to run another batch with")
        self.num_steps += 1
        started = time.perf_counter()
        with _settings(self.capture.meta.get("environment", {})):
            model, optimizer = self._build(seed, change)
            chosen = self.capture.batches if batches is None else batches
            if change.batches is not None:
                chosen = change.batches(chosen)
            capture = self.capture
            if change.dtype is not None:
                chosen = tree_map(lambda leaf: _cast(leaf, change.dtype), chosen)
                calls = tree_map(lambda leaf: _cast(leaf, change.dtype), capture.payload.get("calls", []))
                capture = replace(capture, payload={**capture.payload, "calls": calls})
            if tracer is not None:
                self._declare(tracer, model, optimizer, chosen)
            run = StepRun(capture, self.target, model, optimizer, change=change, tracer=tracer)
            step = run.all_phases(chosen)
            if look_ahead:
                step.next_outputs, step.next_error = run.next_forward(chosen)
        step.outcome = replace(step.outcome, seconds=time.perf_counter() - started)
        return step

    def determinism(self, step: ReplayedStep) -> Determinism:
        """Whether the replayed step has the captured loss and gradients, bit for bit."""
        observed = self.capture.meta.get("observed")
        if observed is None:
            return Determinism("unknown", "the file holds a batch only, nothing to compare with")
        if self._is_checkpoint:
            return Determinism("unknown", "the weights come from the checkpoint, not from the captured step")
        if observed.get("crash"):
            return _same_error(step.outcome.error, observed["crash"])
        if self.capture.batches:
            differs = self._differing_loss(step.outcome.loss, observed)
            if differs:
                return differs
        return self._compared_gradients(step, observed["gradient_checksums"])

    def _differing_loss(self, loss: float, observed: dict[str, Any]) -> Determinism | None:
        recorded = float.fromhex(observed["loss"])
        if loss == recorded or (math.isnan(loss) and math.isnan(recorded)):
            return None
        return Determinism("differs", f"loss {loss:.9g}, captured {recorded:.9g}{self._environment_hint()}")

    def _compared_gradients(self, step: ReplayedStep, checksums: dict[str, str]) -> Determinism:
        """The loss is equal, or is not in the capture: that of a model without a target was computed elsewhere."""
        loss = "loss" if self.capture.batches else ""
        if not checksums:
            return Determinism("bit-identical", loss) if loss else Determinism("unknown", "no gradient was captured")
        differing = [name for name, value in checksums.items() if step.gradient_checksums.get(name) != value]
        if differing:
            share = f"{len(differing)} of {len(checksums)} gradients, first {differing[0]}"
            hint = self._environment_hint()
            if not hint and self.target.max_grad_norm is None:
                hint = "; the target names no max_grad_norm: if the loop clips, so must the replay"
            return Determinism("differs", f"{'loss equal, ' if loss else ''}{share}{hint}")
        of_all = f"{len(checksums)} of {len(checksums)} gradients"
        return Determinism("bit-identical", f"loss and {of_all}" if loss else of_all)

    def _environment_hint(self) -> str:
        differing = differences(self.capture.meta.get("environment", {}))
        return f" ({differing})" if differing else ""

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
            if value.dtype != named[name].dtype and not self._is_checkpoint:
                raise TargetError(
                    f"the {what} does not fit target {self.target.name}: {name} is {value.dtype} there, "
                    f"{named[name].dtype} in the model",
                    help="convert the model in build(seed), as the loop did",
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


def _boundary(capture: Capture) -> Capture:
    """What can be replayed without a loss: the model's own inputs and output gradients, where they are inside."""
    if not capture.payload.get("calls"):
        return capture
    return replace(capture, payload={**capture.payload, "batches": [], "control": []})


def _has_way_back(capture: Capture) -> bool:
    """Whether any output got a gradient; a step that ended in an error needs none."""
    crashed = bool(capture.meta.get("observed", {}).get("crash"))
    return crashed or any(call["output_grads"] for call in capture.payload.get("calls", []))


def _same_error(error: str, captured: str) -> Determinism:
    """A step that ended in an error left no loss and no gradients to compare."""
    if error.endswith(captured):
        return Determinism("unknown", "the step ended in the same error as the captured one")
    return Determinism("differs", f"{error or 'no error'}, captured {captured}")


@contextlib.contextmanager
def _settings(environment: dict[str, Any]) -> Iterator[None]:
    """The captured threads and default dtype; the process's own and its random numbers are put back afterwards."""
    threads, dtype, state = torch.get_num_threads(), torch.get_default_dtype(), rng_state()
    if "num_threads" in environment:
        torch.set_num_threads(int(environment["num_threads"]))
    torch.set_default_dtype(_DEFAULT_DTYPES.get(str(environment.get("default_dtype")), dtype))
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
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
