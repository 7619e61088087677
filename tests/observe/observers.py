"""Everything that can be put around a loop, in one form: a context, and what it complained about afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import nanhunt
from nanhunt.observe.exact import ExactTracer


@dataclass(frozen=True)
class Observed:
    """An observer at work.

    Attributes:
        observer: What holds the records.
        complaints: What it found, and what it could not do; to be asked afterwards.
    """

    observer: Any
    complaints: Callable[[], list[str]]


Observer = Callable[[nn.Module, Optimizer, Path], AbstractContextManager[Observed]]


@contextlib.contextmanager
def unobserved(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
    yield Observed(None, list)


def _watching(**options: Any) -> Observer:
    @contextlib.contextmanager
    def observer(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
        with nanhunt.watch(model, optimizer, out_dir=folder, **options) as watch:
            yield Observed(watch, lambda: [*(fault.message for fault in watch.faults), *map(str, folder.iterdir())])

    return observer


@contextlib.contextmanager
def _trace(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
    with nanhunt.trace(model, optimizer) as hunt:
        yield Observed(hunt, lambda: _reported(hunt.report()))


def _reported(report: Any) -> list[str]:
    assert (report.first is None) == (not report.findings)
    return [str(item) for item in (*report.findings, *report.skips)]


@contextlib.contextmanager
def _exact(model: nn.Module, optimizer: Optimizer, folder: Path, **options: Any) -> Iterator[Observed]:
    tracer = ExactTracer(model, **options)
    with tracer:
        yield Observed(tracer, lambda: _traced(tracer, model))


def _traced(tracer: ExactTracer, model: nn.Module) -> list[str]:
    tracer.reached("parameter", [(name, parameter.detach()) for name, parameter in model.named_parameters()])
    trace = tracer.trace
    return [*trace.problems, *map(str, trace.skipped), *([str(trace.first_offender)] if trace.first_offender else [])]


def _focused(model: nn.Module, optimizer: Optimizer, folder: Path) -> AbstractContextManager[Observed]:
    # The last of them is never reached, so the steps are not ended early.
    return _exact(model, optimizer, folder, focus=[*range(200), 10**9])


def offending_module(observed: Observed) -> str:
    """The module that ``nanhunt.trace`` places the first fault in."""
    return observed.observer.report().first.location.module


OBSERVERS: dict[str, Observer] = {
    "watch": _watching(),
    "watch-trace-finite": _watching(trace_finite=True),
    "trace": _trace,
    "focused": _focused,
}
