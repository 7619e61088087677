"""The sentinel: looks at the loss and the gradients of every step before the optimizer moves the weights.

NOTE on what it costs and what it keeps.

1. One read per step: the sums of the loss and of all gradients, stacked. A non-finite sum is confirmed exactly.
2. A step is judged where it would do harm, in the optimizer's own pre-hook. What a loop or a ``GradScaler`` skips by
   itself never gets there and is no fault.
3. The weights still are the captured ones then: nothing has to be copied beforehand but buffers (a forward pass may
   move them) and the states of the random generators.
4. Batches and model inputs are kept by reference since the last step; their version counters tell whether the loop has
   written into them since.
"""

import contextlib
import math
import os
import platform
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nanhunt.capture.format import Capture, checksum, plain, write_capture
from nanhunt.capture.rng import rng_state
from nanhunt.errors import CaptureError, NonFiniteStep
from nanhunt.observe.finite import is_finite, sums, tally
from nanhunt.observe.modules import ModuleTracer
from nanhunt.records.modules import ModuleFault
from nanhunt.records.steps import Tally

OnFault = Literal["raise", "skip", "record"]

MAX_CALLS = 64
"""Model calls kept per step. A loop that never steps must not fill the memory; what is older is dropped and said."""


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
    """

    step: int
    loss: float
    gradients: Tally
    capture: Path | None
    problem: str = ""
    module_fault: ModuleFault | None = None

    @property
    def message(self) -> str:
        """What happened, as one line."""
        what = f"loss {self.loss:.6g}" if not math.isfinite(self.loss) else f"loss {self.loss:.6g} (finite)"
        grads = self.gradients
        return f"step {self.step} is non-finite: {what}, {grads.tensors} of {grads.num_tensors} gradients non-finite"


@dataclass
class _ModelCall:
    """One forward of the watched model: what went in, and the gradients that came back to its outputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    autocast: dict[str, Any]
    output_grads: dict[int, Tensor] = field(default_factory=dict)
    num_outputs: int = 0


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
    ) -> None:
        if on_fault not in ("raise", "skip", "record"):
            raise ValueError(f"on_fault is 'raise', 'skip' or 'record', not {on_fault!r}")
        self.step = start_step
        self.faults: deque[Fault] = deque(maxlen=100)
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._out_dir, self._on_fault = Path(out_dir), on_fault
        self._target, self._config = target, dict(config) if config is not None else None
        self._modules = ModuleTracer(model) if trace_finite else None
        self._handles: list[Any] = []
        self._inner_backward: Callable[..., Any] | None = None
        self._control: list[Any] = []
        self._begin_step()

    def _begin_step(self) -> None:
        self._batches: list[Any] = []
        self._calls: deque[_ModelCall] = deque(maxlen=MAX_CALLS)
        self._num_calls = 0
        self._losses: list[Tensor] = []
        self._rng: dict[str, Any] | None = None
        self._buffers: dict[str, Tensor] = {}

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Passes the loader's batches through and keeps the current ones, so that a capture can hold the labels too."""
        for batch in loader:
            self.note_batch(batch)
            yield batch

    def note_batch(self, batch: Any) -> None:
        """Tells the sentinel what the next step is made of, where the loop has no loader to wrap."""
        self._batches.append(batch)
        del self._batches[:-MAX_CALLS]

    def __enter__(self) -> Self:
        if self._modules is not None:
            self._modules.__enter__()
        self._handles = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._inner_backward = torch.autograd.backward
        torch.autograd.backward = self._backward
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._inner_backward is not None:
            torch.autograd.backward = self._inner_backward
        for handle in self._handles:
            handle.remove()
        if self._modules is not None:
            self._modules.__exit__(None, None, None)
        if isinstance(error, torch.linalg.LinAlgError):
            self._capture_crash(error)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._rng is None:
            self._rng = rng_state()
            self._buffers = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}
        versions = [leaf._version for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._calls.append(_ModelCall(args, kwargs, versions, _autocast_state()))
        self._num_calls += 1

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not self._calls:
            return
        call = self._calls[-1]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        call.num_outputs = len(outputs)
        for position, tensor in enumerate(outputs):
            if tensor.requires_grad:
                tensor.register_hook(_keeper(call, position))

    def _backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``torch.autograd.backward`` while the watch is on: notes the loss, changes nothing."""
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        self._losses.extend(root.detach() for root in roots if isinstance(root, Tensor))
        del self._losses[:-MAX_CALLS]
        assert self._inner_backward is not None
        return self._inner_backward(tensors, *args, **kwargs)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[0] if args and callable(args[0]) else kwargs.get("closure")
        if closure is None:
            self._judge_step()
            return None

        def watched_closure() -> Any:
            value = closure()
            self._judge_step()
            return value

        return ((watched_closure, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": watched_closure})

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._batches:
            self._control = self._batches
        self.step += 1
        self._begin_step()
        if self._modules is not None:
            self._modules.begin_step()

    def _judge_step(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        with torch.no_grad():
            totals = sums([*self._losses, *gradients])
            if totals is None or math.isfinite(totals.sum().item()):
                return
            if all(is_finite(tensor) for tensor in [*self._losses, *gradients]):
                return
        self._handle_fault("")

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _capture_crash(self, error: BaseException) -> None:
        """A decomposition that refuses its input ends the loop before any step; what led to it is kept all the same."""
        with contextlib.suppress(NonFiniteStep):
            self._handle_fault(str(error).splitlines()[0])

    def _handle_fault(self, crash: str) -> None:
        loss = float(sum(float(item.float().sum()) for item in self._losses)) if self._losses else math.nan
        named = [(name, p.grad) for name, p in self._model.named_parameters() if p.grad is not None]
        gradients = tally(named)
        module_fault = self._modules.fault() if self._modules is not None else None
        path, problem = None, ""
        try:
            path = write_capture(self._capture(loss, gradients, named, crash), self._out_dir)
        except CaptureError as error:
            problem = str(error)
        fault = Fault(self.step, loss, gradients, path, problem, module_fault)
        self.faults.append(fault)
        self._act_on(fault)

    def _act_on(self, fault: Fault) -> None:
        where = f"; saved {fault.capture}" if fault.capture else f"; not saved: {fault.problem}"
        if self._on_fault == "raise":
            hint = f"nanhunt replay {fault.capture}" if fault.capture else "free some space and run again"
            raise NonFiniteStep(
                fault.message,
                step=fault.step,
                capture=str(fault.capture) if fault.capture else None,
                module_message=fault.module_fault.message if fault.module_fault else "",
                help=f"run: {hint}" if fault.capture else hint,
            )
        action = "skipped" if self._on_fault == "skip" else "going on"
        warnings.warn(f"nanhunt: {fault.message}{where}; {action}", RuntimeWarning, stacklevel=4)
        if self._on_fault == "skip":
            # An optimizer passes over parameters without a gradient, so neither weights nor moments move.
            for parameter in self._parameters():
                parameter.grad = None

    def _capture(self, loss: float, gradients: Tally, named: list[tuple[str, Tensor]], crash: str) -> Capture:
        """The step as it stands now: weights and optimizer are still those from before it."""
        payload: dict[str, Any] = {
            "batches": self._stored_batches(),
            "control": [plain(batch) for batch in self._control],
            "calls": [] if self._batches and self._target else [_stored_call(call) for call in self._calls],
            "model": {name: plain(value) for name, value in _state(self._model).items()},
            "buffers_before": {name: plain(value) for name, value in self._buffers.items()},
            "optimizer": plain(self._optimizer.state_dict()),
            "rng": plain(self._rng or rng_state()),
        }
        if self._scaler is not None:
            payload["scaler"] = plain(self._scaler.state_dict())
        meta = {
            "step": self.step,
            "num_micro_steps": self._num_calls,
            "num_calls_dropped": max(0, self._num_calls - MAX_CALLS),
            "inputs_modified": any(_was_modified(call) for call in self._calls),
            "target": {"name": self._target, "config": self._config} if self._target else None,
            "model": {
                "class": f"{type(self._model).__module__}.{type(self._model).__qualname__}",
                "training": {name: module.training for name, module in self._model.named_modules()},
            },
            "optimizer": type(self._optimizer).__name__,
            "autocast": self._calls[-1].autocast if self._calls else _autocast_state(),
            "observed": {
                "loss": float(loss).hex() if math.isfinite(loss) else str(loss),
                "gradients_nonfinite": gradients.tensors,
                "num_gradients": gradients.num_tensors,
                "gradient_checksums": {name: checksum(canonical(grad)) for name, grad in named},
                "crash": crash,
            },
            "environment": environment(),
        }
        return Capture(meta, payload)

    def _stored_batches(self) -> list[Any]:
        try:
            return [plain(batch) for batch in self._batches]
        except CaptureError as error:
            warnings.warn(f"nanhunt: the batch is not kept: {error}", RuntimeWarning, stacklevel=2)
            return []


def watch(model: nn.Module, optimizer: Optimizer, **options: Any) -> Watch:
    """Watches a training loop and saves the step that goes non-finite, before it can poison the weights.

    Use as ``with nanhunt.watch(model, optimizer, out_dir="debug"):`` around any loop. The values, random numbers and
    results of the loop are the same with and without it. On CUDA it reads one number per step, which waits for the
    backward pass of that step.

    Args:
        model: The model whose forward is called in the loop.
        optimizer: Its optimizer.
        options: ``out_dir``: folder of the captures, "debug". ``on_fault``: "raise" (default) stops with
            ``NonFiniteStep``; "skip" leaves weights and moments as they are and goes on; "record" goes on with the
            step. ``target``: what ``--target`` would be given to rebuild the model. ``config``: JSON data kept for
            that target. ``scaler``: the loop's ``GradScaler``, to be kept in the capture. ``start_step``: number of
            the first step. ``trace_finite``: also follow every module's output and gradient (forward and tensor
            hooks, one read a step).

    Raises:
        ValueError: If ``on_fault`` is none of the three.
        NonFiniteStep: From the loop's ``optimizer.step()``, with ``on_fault="raise"``.
    """
    return Watch(model, optimizer, **options)


def canonical(tensor: Tensor) -> Tensor:
    """The values with every NaN replaced by one and the same NaN, so that its sign and payload do not matter."""
    values = tensor.detach()
    return torch.where(torch.isnan(values), torch.full_like(values, math.nan), values)


def environment() -> dict[str, Any]:
    """What a replay must match to be bit-identical."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "flush_denormal": bool(torch.tensor(1e-40, dtype=torch.float32).mul(1.0).item() == 0.0),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "rank": int(os.environ.get("RANK", "0")),
        "command": " ".join(Path(part).name if position == 0 else part for position, part in enumerate(sys.argv)),
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, non-persistent ones too, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _keeper(call: _ModelCall, position: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        call.output_grads[position] = gradient.detach()

    return keep


def _stored_call(call: _ModelCall) -> dict[str, Any]:
    gradients = {str(position): plain(gradient) for position, gradient in call.output_grads.items()}
    return {"args": plain(list(call.args)), "kwargs": plain(call.kwargs), "output_grads": gradients}


def _was_modified(call: _ModelCall) -> bool:
    leaves = [leaf._version for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return leaves != call.versions


def _autocast_state() -> dict[str, Any]:
    """Which device type is under autocast, and its dtype; empty if none is."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return {"device": device, "dtype": str(torch.get_autocast_dtype(device)).removeprefix("torch.")}
    return {}
