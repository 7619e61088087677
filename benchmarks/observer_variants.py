"""What is put around a training loop: nanhunt's observers, torch's own and those of other packages.

NOTE on how each is used. Every observer stands around a block of steps, as it would around a loop, and is put on and
taken off outside of the timed steps; what that takes is measured beside them. Three leave something behind and differ:

1. ``transformers``' hooks cannot be removed, so it has a model of its own and is put on once.
2. ``msprobe``'s debugger is started and stopped around the forward and backward pass of every step, and writes its
   statistics then; that is its documented use and part of the timed step. It replaces most of torch's functions while
   it is on; its own ``restore_all_api`` puts them back after the block. What it wrote is removed after the block.
3. ``msprobe``'s monitor hooks a model and an optimizer for good and has both to itself.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from observer_models import Workload
from observer_native import looking_natively, native

import nanhunt


class Observer:
    """Puts an observer around steps.

    Attributes:
        package: What must be importable for it.
        has_own_model: Whether it leaves something on the model, which must not be watched by others then.
        note: What was chosen where there is a choice.
    """

    package = "torch"
    has_own_model = False
    note = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, work: Workload) -> None:
        """What is done once, before all blocks."""

    def around(self, work: Workload) -> AbstractContextManager[Any]:
        """What stands around a block."""
        return contextlib.nullcontext()

    def step(self, work: Workload) -> None:
        """One step inside."""
        work.step()

    def clean_up(self) -> None:
        """What is done after each block."""


class Untraced(Observer):
    """Nothing at all."""


class Sentinel(Observer):
    """``nanhunt.watch``."""

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102 - as in the base class
        return nanhunt.watch(work.model, work.optimizer, on_fault="record", out_dir=self.folder)


class ModuleTracer(Observer):
    """``nanhunt.watch`` with the module tracer."""

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        return nanhunt.watch(work.model, work.optimizer, on_fault="record", out_dir=self.folder, trace_finite=True)


class Exact(Observer):
    """``nanhunt.trace``, or the tracer below it in a version that has no such function."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.note = "" if hasattr(nanhunt, "trace") else "observe.exact.ExactTracer, for there is no nanhunt.trace"

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        if hasattr(nanhunt, "trace"):
            return nanhunt.trace(work.model, work.optimizer)
        return importlib.import_module("nanhunt.observe.exact").ExactTracer(work.model)


class ExactOnly(Observer):
    """``nanhunt.trace`` without the probe for finite trouble, which looks at the first 8 steps and at few later ones.

    Blocks are short and begin anew, so that beside it every step of a block is one of the first.
    """

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        return nanhunt.trace(work.model, work.optimizer, finite=False)


class DetectAnomaly(Observer):
    """``torch.autograd.detect_anomaly``."""

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        return torch.autograd.detect_anomaly()


class DebugMode(Observer):
    """``torch.utils._debug_mode.DebugMode`` as it comes."""

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        return importlib.import_module("torch.utils._debug_mode").DebugMode()


class UnderflowOverflow(Observer):
    """``transformers.debug_utils.DebugUnderflowOverflow``."""

    package = "transformers"
    has_own_model = True

    def prepare(self, work: Workload) -> None:  # noqa: D102
        importlib.import_module("transformers.debug_utils").DebugUnderflowOverflow(work.model)


class Msprobe(Observer):
    """``msprobe``'s ``PrecisionDebugger``, task statistics, level L1 (functions of torch), which are its defaults."""

    package = "msprobe"
    has_own_model = True
    note = "PrecisionDebugger, task statistics, level L1 (functions), written each step"

    def prepare(self, work: Workload) -> None:  # noqa: D102
        config = {
            "task": "statistics",
            "dump_path": str(self.folder / "dump"),
            "rank": [],
            "step": [],
            "level": "L1",
            "statistics": {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"},
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        debugger = importlib.import_module("msprobe.pytorch").PrecisionDebugger
        # There is one debugger per process; each model gets a new one.
        debugger._instance = None
        self._debugger = debugger(config_path=str(path))
        self._functions = self._debugger.service.api_register
        self._functions.restore_all_api()

    @contextlib.contextmanager
    def around(self, work: Workload) -> Iterator[None]:  # noqa: D102
        self._functions.register_all_api()
        try:
            yield
        finally:
            self._functions.restore_all_api()

    def step(self, work: Workload) -> None:  # noqa: D102
        self._debugger.start(model=work.model)
        work.backward()
        self._debugger.stop()
        work.update()
        self._debugger.step()

    def clean_up(self) -> None:  # noqa: D102
        shutil.rmtree(self.folder / "dump", ignore_errors=True)


class MsprobeMonitor(Observer):
    """``msprobe``'s ``TrainerMon``: NaN count, norm, minimum and maximum of module outputs and gradients."""

    package = "msprobe"
    has_own_model = True
    note = "TrainerMon, nans norm min max of every module and weight gradient, written each step"

    def prepare(self, work: Workload) -> None:  # noqa: D102
        config = {
            "targets": {name: {} for name, _ in work.model.named_modules() if name},
            "format": "csv",
            "ops": ["nans", "norm", "min", "max"],
            "xy_distribution": True,
            "wg_distribution": True,
        }
        path = self.folder / "monitor.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        os.environ["MONITOR_OUTPUT_DIR"] = str(self.folder / "monitor")
        monitor = importlib.import_module("msprobe.pytorch").TrainerMon(str(path), params_have_main_grad=False)
        monitor.set_monitor(work.model, work.optimizer, grad_acc_steps=1)


class NativeFloor(Observer):
    """A C++ callback that only looks: what an observer outside Python could not go below."""

    package = "ninja"

    def prepare(self, work: Workload) -> None:  # noqa: D102
        native()

    def around(self, work: Workload) -> AbstractContextManager[Any]:  # noqa: D102
        return looking_natively()


OBSERVERS: dict[str, Callable[[Path], Observer]] = {
    "untraced": Untraced,
    "untraced again": Untraced,
    "sentinel": Sentinel,
    "module tracer": ModuleTracer,
    "exact tracer": Exact,
    "exact, later steps": ExactOnly,
    "native floor": NativeFloor,
    "detect_anomaly": DetectAnomaly,
    "DebugMode": DebugMode,
    "transformers": UnderflowOverflow,
    "msprobe": Msprobe,
    "msprobe monitor": MsprobeMonitor,
}
"""By name; the first is what the others are compared with."""


def why_missing(observer: Observer) -> str:
    """Why the observer's package cannot be imported here; empty if it can."""
    try:
        with quiet():
            importlib.import_module(observer.package)
    except Exception as error:  # noqa: BLE001 - a package may fail in any way where its hardware is missing
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the output, the log lines and the warnings of observers to itself."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.__stderr__, flush=True)
