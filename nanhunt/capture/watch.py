"""The sentinel: looks at the loss and the gradients of every step before the optimizer moves the weights.

NOTE on what it costs and what it keeps.

1. One read per step: the sum of the loss and of all gradients. A non-finite sum is confirmed exactly.
2. A step is judged where it would do harm, in the optimizer's own pre-hook. What a loop or a ``GradScaler`` skips by
   itself never gets there and is no fault.
3. The weights still are the captured ones then: nothing has to be copied beforehand but buffers (a forward pass may
   move them) and the states of the random generators.
4. Batches and model inputs are kept by reference since the last step (``kept.py``); their version counters tell whether
   the loop has written into them since.
"""

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.capture.environment import autocast_state, environment
from nanhunt.capture.format import Capture, checksum, plain, write_capture
from nanhunt.capture.kept import Buffers, KeptStep, ModelCall
from nanhunt.capture.rng import rng_state
from nanhunt.errors import CaptureError, NonFiniteStep, first_line
from nanhunt.observe.calls import ModuleCalls, stand_in_for_backward
from nanhunt.observe.collectives import own_part
from nanhunt.observe.compiled import keep_out
from nanhunt.observe.finite import all_finite, stored_values, tally
from nanhunt.observe.holders import unwrapped
from nanhunt.observe.modes import unseen
from nanhunt.observe.modules import ModuleTracer
from nanhunt.observe.patches import StandIn
from nanhunt.observe.ranks import is_alone, rank
from nanhunt.observe.source import user_frame
from nanhunt.records.modules import ModuleFault
from nanhunt.records.steps import Tally

OnFault = Literal["raise", "skip", "record"]


@dataclass(frozen=True)
class Fault:
    """A step that went non-finite.

    Attributes:
        step: Optimizer step, from 0.
        loss: Its loss; NaN or infinite, or finite where only gradients are bad.
        gradients: Non-finite gradients as the optimizer would have seen them.
        capture: The file, or None if it could not be written.
        problem: Why it could not be written.
        module_fault: Where the module tracer saw it first, if it ran.
        crash: The error that ended the step, as one line; empty if it went on to the optimizer.
        rank: Process of a distributed run; None outside.
    """

    step: int
    loss: float
    gradients: Tally
    capture: Path | None
    problem: str = ""
    module_fault: ModuleFault | None = None
    crash: str = ""
    rank: int | None = None

    @property
    def message(self) -> str:
        """What happened, as one line."""
        step = f"step {self.step}" if self.rank is None else f"step {self.step} on rank {self.rank}"
        if self.crash:
            return f"{step} ended in an error: {self.crash}"
        what = f"loss {self.loss:.6g}" if not math.isfinite(self.loss) else f"loss {self.loss:.6g} (finite)"
        grads = self.gradients
        return f"{step} is non-finite: {what}, {grads.tensors} of {grads.num_tensors} gradients non-finite"


class Watch:
    """The always-on sentinel; use ``nanhunt.watch``.

    Attributes:
        step: Optimizer steps seen so far.
        faults: Steps that went non-finite, newest last (the newest 100).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        out_dir: str | Path = "debug",
        on_fault: OnFault = "raise",
        target: str = "",
        config: Mapping[str, Any] | None = None,
        scaler: Any = None,
        start_step: int = 0,
        trace_finite: bool = False,
        max_captures: int = 20,
    ) -> None:
        if on_fault not in ("raise", "skip", "record"):
            raise ValueError(f"on_fault is 'raise', 'skip' or 'record', not {on_fault!r}")
        self.step = start_step
        self.faults: deque[Fault] = deque(maxlen=100)
        self._model = unwrapped(model)
        self._optimizer, self._scaler = optimizer, scaler
        self._out_dir, self._on_fault = Path(out_dir), on_fault
        self._target, self._config = target, dict(config) if config is not None else None
        self._modules = ModuleTracer(model) if trace_finite else None
        self._handles: list[Any] = []
        self._calls = ModuleCalls(model, self._before_forward, self._after_forward)
        self._backward: StandIn | None = None
        self._control: list[Any] = []
        self._num_captures, self._max_captures = 0, max_captures
        self._buffers = Buffers(self._model)
        self._begin_step()

    def _begin_step(self) -> None:
        self._kept = KeptStep()
        self._is_faulty = False

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Passes the loader's batches through and keeps the current ones, so that a capture can hold the labels too."""
        for batch in loader:
            self.note_batch(batch)
            yield batch

    def note_batch(self, batch: Any) -> None:
        """Tells the sentinel what the next step is made of, where the loop has no loader to wrap."""
        self._kept.note_batch(batch)

    def __enter__(self) -> Self:
        if self._modules is not None:
            self._modules.__enter__()
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._calls.follow()
        self._backward = stand_in_for_backward(self._before_backward, self._after_backward)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._calls.leave()
        if self._backward is not None:
            self._backward.leave()
        for handle in self._handles:
            handle.remove()
        self._kept.let_go()
        if self._modules is not None:
            self._modules.__exit__(None, None, None)
        if isinstance(error, torch.linalg.LinAlgError):
            with unseen():
                self._capture_crash(error)

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall | None:
        if not torch.is_grad_enabled():
            return None
        with unseen():
            return self._kept.note_call(self._buffers, args, kwargs, autocast_state())

    def _after_forward(self, call: ModelCall, output: Any) -> None:
        if torch.is_grad_enabled():
            with unseen():
                call.keep_gradients_of(output)

    def _before_backward(self, roots: Any) -> None:
        with unseen():
            self._kept.begin_backward([roots] if isinstance(roots, Tensor) else roots, self._parameters())

    def _after_backward(self) -> None:
        with unseen():
            self._kept.end_backward(self._parameters())

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The first of the arguments is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.judge_step()
            return None

        def watched_closure() -> Any:
            value = closure()
            self.judge_step()
            return value

        if len(args) > 1:
            return (args[0], watched_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched_closure}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_faulty:
            self._control = self._kept.taking_part(ended_in_error=False)[0] or self._control
        self.step += 1
        self._kept.let_go()
        self._calls.follow()
        self._begin_step()
        if self._modules is not None:
            self._modules.begin_step()

    def judge_step(self) -> None:
        """Looks at the step as it stands; the optimizer's pre-hook does it by itself."""
        with unseen():
            seen = [*self._kept.losses, *(p.grad for p in self._parameters() if p.grad is not None)]
            with torch.no_grad():
                if all_finite(seen) or self._is_passed_over():
                    return
            self._handle_fault("")

    def _is_passed_over(self) -> bool:
        """Whether a ``GradScaler`` has told a fused optimizer to leave this step out."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _capture_crash(self, error: BaseException) -> None:
        """A decomposition that refuses its input ends the loop before any step; what led to it is kept all the same."""
        self._handle_fault(first_line(error))
        saved = self.faults[-1].capture
        error.add_note(f"nanhunt: saved {saved}; run: nanhunt replay {saved}" if saved else "nanhunt: not saved")

    def _handle_fault(self, crash: str) -> None:
        self._is_faulty = True
        loss = self._loss()
        given = [(name, p.grad) for name, p in self._model.named_parameters() if p.grad is not None]
        named = [(name, part) for name, gradient in given if (part := own_part(gradient)) is not None]
        gradients = tally(named)
        module_fault = None
        if self._modules is not None:
            module_fault = self._modules.fault(loss_is_finite=math.isfinite(loss))
        path, problem = None, ""
        try:
            if self._num_captures >= self._max_captures:
                raise CaptureError(f"this run has saved {self._max_captures} captures already")
            if any(own_part(gradient) is not gradient for _, gradient in given):
                raise CaptureError("the model is sharded over several processes, and a piece of it cannot be replayed")
            path = write_capture(self._capture(loss, gradients, named, crash), self._out_dir)
            self._num_captures += 1
        except CaptureError as error:
            problem = str(error)
        process = None if is_alone() else rank()
        fault = Fault(self.step, loss, gradients, path, problem, module_fault, crash, process)
        self.faults.append(fault)
        if not crash:
            # After an error there is neither a step to skip nor one to go on with.
            self._act_on(fault)

    def _loss(self) -> float:
        """The sum of the step's losses, without the loss scale."""
        losses = self._kept.losses
        scale = self._scaler.get_scale() if self._scaler is not None else 1.0
        # Half precision would overflow in the sum; float64 is kept, for the replay compares to the last bit.
        wide = [loss if loss.dtype == torch.float64 else loss.float() for loss in losses]
        return sum(float(loss.sum()) for loss in wide) / scale if wide else math.nan

    def _act_on(self, fault: Fault) -> None:
        where = f"; saved {fault.capture}" if fault.capture else f"; not saved: {fault.problem}"
        if self._on_fault == "raise":
            raise NonFiniteStep(
                fault.message if fault.capture else f"{fault.message}{where}",
                step=fault.step,
                capture=str(fault.capture) if fault.capture else None,
                module_message=fault.module_fault.message if fault.module_fault else "",
                help=f"run: nanhunt replay {fault.capture}" if fault.capture else "",
            )
        action = "skipped" if self._on_fault == "skip" else "going on"
        file, line, _ = user_frame() or (__file__, 0, "")
        warnings.warn_explicit(f"nanhunt: {fault.message}{where}; {action}", RuntimeWarning, file, line)
        if self._on_fault == "skip":
            # An optimizer passes over parameters without a gradient, so neither weights nor moments move.
            for parameter in self._parameters():
                parameter.grad = None
            before = self._kept.start.buffers if self._kept.start is not None else {}
            with torch.no_grad():
                for name, buffer in self._model.named_buffers():
                    if name in before and not buffer.is_inference():
                        buffer.copy_(before[name])

    def _capture(self, loss: float, gradients: Tally, named: list[tuple[str, Tensor]], crash: str) -> Capture:
        """The step as it stands now: weights and optimizer are still those from before it."""
        batches, calls, start = self._kept.taking_part(ended_in_error=bool(crash))
        stored = _stored("the batch", batches)
        payload: dict[str, Any] = {
            "batches": stored,
            "control": _stored("the control batch", self._control),
            "calls": [] if stored and self._target else _stored("the model's input", [_described(c) for c in calls]),
            "model": {name: plain(value) for name, value in _state(self._model).items()},
            "buffers_before": {name: plain(value) for name, value in start.buffers.items()} if start else {},
            "optimizer": plain(self._optimizer.state_dict()),
            "rng": plain(rng_state(start.rng if start else None)),
        }
        if self._scaler is not None:
            payload["scaler"] = plain(self._scaler.state_dict())
        meta = {
            "step": self.step,
            "num_micro_steps": self._kept.num_calls,
            "num_calls_dropped": self._kept.num_calls - len(self._kept.calls),
            "inputs_modified": any(call.was_modified for call in calls),
            "target": {"name": self._target, "config": self._config} if self._target else None,
            "model": {
                "class": f"{type(self._model).__module__}.{type(self._model).__qualname__}",
                "training": {name: module.training for name, module in self._model.named_modules()},
            },
            "optimizer": type(self._optimizer).__name__,
            "autocast": calls[-1].autocast if calls else autocast_state(),
            "observed": {
                "loss": float(loss).hex(),
                "gradients_nonfinite": gradients.tensors,
                "num_gradients": gradients.num_tensors,
                "gradient_checksums": {name: checksum(canonical(grad)) for name, grad in named},
                "crash": crash,
            },
            "environment": environment(),
        }
        return Capture(meta, payload)


keep_out(Watch._before_forward, Watch._after_forward, Watch._before_backward, Watch._after_backward)


def watch(model: nn.Module, optimizer: Optimizer, **options: Any) -> Watch:
    """Watches a training loop and saves the step that goes non-finite, before it can poison the weights.

    Use as ``with nanhunt.watch(model, optimizer, out_dir="debug"):`` around any loop. The values, random numbers and
    results of the loop are the same with and without it. On CUDA it reads one number per step, which waits for the
    backward pass of that step.

    Args:
        model: The model whose forward is called in the loop.
        optimizer: Its optimizer.
        options: ``out_dir``: folder of the captures, "debug". ``on_fault``: "raise" (default) stops with
            ``NonFiniteStep``; "skip" leaves weights, moments and buffers as they were before the step and goes on;
            "record" goes on with the step. ``target``: what ``--target`` would be given to rebuild the model.
            ``config``: JSON data kept for that target. ``scaler``: the loop's ``GradScaler``, to be kept in the
            capture. ``start_step``: number of the first step. ``trace_finite``: also follow every module's output and
            gradient (hooks for all modules; off the CPU read only at a fault). ``max_captures``: files written at
            most, 20; what fails after that is reported and not saved.

    Raises:
        ValueError: If ``on_fault`` is none of the three.
        NonFiniteStep: From the loop's ``optimizer.step()``, with ``on_fault="raise"``.
    """
    return Watch(model, optimizer, **options)


def canonical(tensor: Tensor) -> Tensor:
    """The values with every NaN replaced by one and the same NaN, so that its sign and payload do not matter."""
    values = stored_values(tensor).detach()
    if values.layout is not torch.strided:
        return values
    return torch.where(torch.isnan(values), torch.full_like(values, math.nan), values)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, non-persistent ones too, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _stored(what: str, values: list[Any]) -> list[Any]:
    """Copies of the values; none, with a warning, if one of them is no plain data. The rest is worth keeping alone."""
    try:
        return [plain(value) for value in values]
    except CaptureError as error:
        warnings.warn(f"nanhunt: {what} is not kept: {error}", RuntimeWarning, stacklevel=2)
        return []


def _described(call: ModelCall) -> dict[str, Any]:
    gradients = {str(position): gradient for position, gradient in call.output_grads.items()}
    return {"args": list(call.args), "kwargs": call.kwargs, "output_grads": gradients}
