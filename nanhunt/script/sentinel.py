"""The sentinel around a whole script: it finds the models and optimizers by itself, and watches each optimizer's steps.

NOTE on how they are found.

1. Every optimizer is noted when it is made. From then on, until it is watched, the calls of models are looked at:
   the first module called for training that holds a parameter of the optimizer is what the loop calls.
2. A loop that calls no such module is found when it goes backward, or at the latest in the optimizer's first step.
3. While a module runs nothing of ours is in its way, so ``torch.compile`` sees the program as it was written.
4. An optimizer that has rested while others stepped is let go with its model: a script that trains one model after
   the other must not keep them all. It is found again if it steps again.
"""

import functools
import inspect
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nanhunt.capture.watch import Fault, OnFault, Watch
from nanhunt.errors import first_line
from nanhunt.observe.holders import holder_of, holder_of_tensors, path_in, unwrapped, wrapped_by
from nanhunt.observe.patches import Patches, StandIn

RESTING_STEPS = 200
"""Steps of other optimizers after which one that made none is let go."""


@dataclass(frozen=True)
class Found:
    """A model and its optimizer, watched.

    Attributes:
        faults: The steps that went non-finite; filled by the watch.
        model: Class of the model as a whole; '' for an optimizer of tensors that no module holds.
        path: Where the watched part is in the model; '' where it is the model itself.
        target: What ``--target`` may be given to build the watched part; '' if its class takes arguments.
    """

    faults: deque[Fault]
    model: str
    path: str
    target: str


class Sentinel:
    """Watches whatever trains while it is entered.

    Args:
        out_dir: Folder of the captures.
        on_fault: What to do at a fault.
        max_captures: Captures written at most, by each optimizer.

    Attributes:
        found: What is or was watched, in the order found.
        problems: What went wrong with looking; never the script's business.
    """

    def __init__(self, out_dir: Path, on_fault: OnFault, max_captures: int) -> None:
        self.found: list[Found] = []
        self.problems: list[str] = []
        self._options: dict[str, Any] = {"out_dir": out_dir, "on_fault": on_fault, "max_captures": max_captures}
        self._waiting: list[weakref.ref[Optimizer]] = []
        self._watches: dict[Optimizer, Watch] = {}
        self._last_step: dict[Optimizer, int] = {}
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._rested: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._num_steps = 0
        self._scaler: Any = None
        self._patches = Patches(self._guarded)
        self._calls = _OutermostCalls(self._look_at_call)
        self._handles: list[Any] = []

    @property
    def num_steps(self) -> int:
        """Optimizer steps begun."""
        return self._num_steps

    @property
    def faults(self) -> Iterator[tuple[Found, Fault]]:
        """Every step that went non-finite, by optimizer."""
        return ((found, fault) for found in self.found for fault in found.faults)

    def __enter__(self) -> Self:
        self._patches.around(Optimizer, "__init__", None, self._note_optimizer)
        self._patches.around(torch.amp.GradScaler, "__init__", None, self._note_scaler)
        inner = torch.autograd.backward
        self._patches.replace(torch.autograd, "backward", functools.partial(self._backward, inner))
        self._handles = [register_optimizer_step_pre_hook(self._before_step)]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._calls.stop()
        for handle in self._handles:
            handle.remove()
        for number, watch in reversed(list(enumerate(self._watches.values()))):
            # An operation that refused its input is one fault, however many watches there are.
            ended = (kind, error, trace) if number == 0 else (None, None, None)
            self._guarded(watch.__exit__, *ended)
        self._patches.undo()

    def _guarded(self, look: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a look; its own failure becomes a message and never the script's crash."""
        try:
            return look(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the script must go on whatever we trip over
            self.problems.append(f"{type(error).__name__}: {first_line(error)}")
            return None

    def _note_optimizer(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self._waiting.append(weakref.ref(optimizer))
        self._calls.start()

    def _note_scaler(self, scaler: Any, *args: Any, **kwargs: Any) -> None:
        self._scaler = weakref.ref(scaler)

    def _unwatched(self) -> list[Optimizer]:
        optimizers = [reference() for reference in self._waiting]
        return [optimizer for optimizer in optimizers if optimizer is not None and hasattr(optimizer, "param_groups")]

    def _look_at_call(self, module: nn.Module) -> None:
        """Rule 1 of the NOTE."""
        if torch.is_grad_enabled():
            own = {id(parameter) for parameter in module.parameters()}
            for optimizer in self._unwatched():
                if any(id(parameter) in own for parameter in _parameters(optimizer)):
                    self._guarded(self._watch, optimizer, module)

    def _backward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Rule 2 of the NOTE; stands in for ``torch.autograd.backward``."""
        is_first = not self._watches
        for optimizer in self._unwatched():
            self._guarded(self._watch, optimizer, None)
        if is_first and self._watches:
            # The watch has put its own stand-in before this one, and must see this loss as well.
            return torch.autograd.backward(*args, **kwargs)
        return inner(*args, **kwargs)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._num_steps += 1
        if optimizer in self._met:
            if optimizer in self._watches:
                self._last_step[optimizer] = self._num_steps
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            # The watch's own hook comes after this one, in the same step.
            self._guarded(self._watch, optimizer, None)
            return None

        def watched() -> Any:
            value = closure()
            if optimizer not in self._met:
                self._guarded(self._watch, optimizer, None)
            watch = self._watches.get(optimizer)
            if watch is not None:
                watch.judge_step()
            return value

        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    def _watch(self, optimizer: Optimizer, called: nn.Module | None) -> None:
        self._waiting = [known for known in self._waiting if known() not in (None, optimizer)]
        if not self._waiting:
            self._calls.stop()
        # Noted before anything can go wrong: what cannot be watched is not tried again at every step.
        self._met.add(optimizer)
        self._let_go_of_resting()
        parameters = [parameter for parameter in _parameters(optimizer) if parameter.requires_grad]
        holder = holder_of(called) if called is not None else holder_of_tensors(parameters)
        model = _to_watch(called, holder, parameters)
        is_compiled = any(_is_compiled(part) for part in model.modules())
        scaler = self._scaler() if self._scaler is not None else None
        watch = Watch(
            model,
            optimizer,
            scaler=scaler if scaler is not None and scaler.is_enabled() else None,
            trace_finite=not is_compiled,
            start_step=self._rested.get(optimizer, 0),
            **self._options,
        )
        plain = unwrapped(model)
        name = _class_name(holder) if holder is not None else ""
        path = path_in(holder, plain) if holder is not None else ""
        self.found.append(Found(watch.faults, name, path, _target(plain)))
        watch.__enter__()
        self._watches[optimizer] = watch
        self._last_step[optimizer] = self._num_steps

    def _let_go_of_resting(self) -> None:
        """Rule 4 of the NOTE."""
        resting = [known for known, step in self._last_step.items() if self._num_steps - step > RESTING_STEPS]
        for optimizer in resting:
            watch = self._watches.pop(optimizer)
            watch.__exit__(None, None, None)
            self._rested[optimizer] = watch.step
            del self._last_step[optimizer]
            self._met.discard(optimizer)


class _OutermostCalls:
    """Shows every module that is called while no other module runs.

    Args:
        look: What it is shown to.
    """

    def __init__(self, look: Callable[[nn.Module], None]) -> None:
        self._look = look
        self._is_wanted = False
        self._place: StandIn | None = None
        self._thread = threading.get_ident()

    def start(self) -> None:
        """Shows calls from here on."""
        self._is_wanted = True
        self._install()

    def stop(self) -> None:
        """Shows no more."""
        self._is_wanted = False
        self._remove()

    def _install(self) -> None:
        if self._place is None:
            place = self._place = StandIn(nn.Module, "__call__")

            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling() or threading.get_ident() != self._thread or not place.is_on:
                    return place.inner(module, *args, **kwargs)
                kind = type(module)
                has_own = kind.__call__ is not call
                # Rule 3 of the NOTE: what runs within is called as always.
                self._remove()
                try:
                    self._look(module)
                    # A watch that began with the look stands before the class, and must see this call as well.
                    return (place.inner if has_own else kind.__call__)(module, *args, **kwargs)
                finally:
                    if self._is_wanted:
                        self._install()

            place.put(call)

    def _remove(self) -> None:
        if self._place is not None:
            self._place.leave()
            self._place = None


class _Loose(nn.Module):
    """Holds the tensors of an optimizer that no module of the script holds."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        # Not only nn.Parameter can be optimized, and only that can be registered.
        self._parameters.update({str(number): tensor for number, tensor in enumerate(parameters)})  # type: ignore[misc]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _to_watch(called: nn.Module | None, holder: nn.Module | None, parameters: list[Tensor]) -> nn.Module:
    """What the loop calls, if it is all that is trained: its inputs can be replayed. Else the model as a whole."""
    if called is not None:
        while (inner := wrapped_by(called)) is not None and "_orig_mod" not in called._modules:
            called = inner
        own = {id(parameter) for parameter in called.parameters()}
        if holder is None or all(id(parameter) in own for parameter in parameters):
            return called
    return holder if holder is not None else _Loose(parameters)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _target(model: nn.Module) -> str:
    """``module:Class`` where the class can be built without arguments; what is in the script is in no module."""
    kind = type(model)
    try:
        needed = [
            parameter
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        return ""
    is_users = not kind.__module__.startswith(("torch.", "nanhunt."))
    return f"{kind.__module__}:{kind.__qualname__}" if is_users and not needed else ""
