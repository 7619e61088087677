"""Observers change nothing: every bit of a healthy run, and everything around it, is as it is without them."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observers import OBSERVERS, Observed, Observer, unobserved
from surroundings import bits, differences, generators, process
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO
from zoo_run import run, run_of

import nanhunt

BITS, COMPLAINTS, LEFT = "bits", "complaints", "left"
EVERYTHING = (BITS, COMPLAINTS, LEFT)

_MODE = "what is looked up when a module is called runs under the loop's own function mode"

KNOWN: dict[tuple[str, str, str], str] = {(BITS, "function-mode", "watch-trace-finite"): _MODE}
"""What is not as it should be: what of it, the animal, the observer, and why."""


def every_run(what: str) -> pytest.MarkDecorator:
    """All animals under all observers."""
    return pytest.mark.parametrize(
        ("name", "observer"),
        [pytest.param(name, observer, marks=_marks(what, name, observer)) for name in ZOO for observer in OBSERVERS],
    )


def _marks(what: str, name: str, observer: str) -> list[pytest.MarkDecorator]:
    reason = KNOWN.get((what, name, observer))
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


@every_run(BITS)
def test_every_bit_of_the_steps_is_as_without_an_observer(name: str, observer: str):
    assert differences(run_of(name, observer).values, run_of(name).values) == []


@every_run(COMPLAINTS)
def test_a_healthy_run_is_not_complained_about(name: str, observer: str):
    # Values close to the largest float are no fault, but worth a warning.
    justified = "NH102" if (name, observer) == ("large-values", "trace") else "nothing"
    assert [one for one in run_of(name, observer).complaints if justified not in one] == []


@every_run(LEFT)
def test_nothing_is_left_behind(name: str, observer: str):
    assert run_of(name, observer).left == run_of(name).left
    assert differences(run_of(name, observer).hooks, run_of(name).hooks) == []


@pytest.mark.parametrize("name", ZOO)
def test_an_unobserved_run_repeats_itself_to_the_bit(name: str):
    assert differences(run(ZOO[name], unobserved).values, run_of(name).values) == []


FEW = ("mlp", "checkpoint", "gan", "float16-scaler", "lbfgs-closure", "gradient-accumulation")


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("name", FEW)
def test_observers_can_follow_one_another(name: str, observer: str):
    twice, never = (run(ZOO[name], each, times=2) for each in (OBSERVERS[observer], unobserved))

    assert differences(twice.values, never.values) == []
    assert (twice.complaints, twice.left) == ([], [])
    assert twice.hooks == never.hooks


def nested(*names: str) -> Observer:
    @contextlib.contextmanager
    def observer(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
        with contextlib.ExitStack() as stack:
            seen = [stack.enter_context(OBSERVERS[name](model, optimizer, folder)) for name in names]
            yield Observed(None, lambda: [complaint for one in seen for complaint in one.complaints()])

    return observer


@pytest.mark.parametrize(
    "names",
    [("trace", "watch"), ("watch", "trace"), ("watch", "watch"), ("trace", "watch-trace-finite")],
    ids="-in-".join,
)
@pytest.mark.parametrize("name", FEW)
def test_observers_can_stand_inside_one_another(name: str, names: tuple[str, ...]):
    observed = run(ZOO[name], nested(*names))

    assert differences(observed.values, run_of(name).values) == []
    assert (observed.complaints, observed.left) == ([], [])
    assert observed.hooks == run_of(name).hooks


def test_one_watch_can_be_entered_twice(tmp_path: Path):
    entry = ZOO["mlp"]
    training = entry.begin(5)
    watch = nanhunt.watch(training.model, training.optimizer, out_dir=tmp_path)

    for number in range(2):
        with watch:
            entry.step(training, entry.batch(number))

    assert watch.step == 2
    assert not watch.faults


@pytest.mark.parametrize(
    "names",
    [("watch", "watch"), ("trace", "watch"), ("watch", "trace"), ("watch-trace-finite", "watch")],
    ids="-then-".join,
)
def test_observers_of_two_models_can_end_in_the_order_they_began(names: tuple[str, str], tmp_path: Path):
    before = process()
    runs = [ZOO["mlp"].begin(seed) for seed in (1, 2)]
    observers = [OBSERVERS[name](each.model, each.optimizer, tmp_path) for name, each in zip(names, runs, strict=True)]

    for observer in observers:
        observer.__enter__()
    for number, observer in enumerate(observers):
        for each in runs:
            ZOO["mlp"].step(each, ZOO["mlp"].batch(number))
        observer.__exit__(None, None, None)

    assert differences(process(), before) == []


@pytest.mark.parametrize("on_fault", ["skip", "record"])
def test_a_fault_draws_no_random_numbers(on_fault: str, tmp_path: Path):
    def states(watched: bool) -> dict[str, Any]:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 - the global generator is what is tested
        training = ZOO["mlp"].begin(5)
        watch = nanhunt.watch(training.model, training.optimizer, out_dir=tmp_path, on_fault=on_fault)
        with watch if watched else contextlib.nullcontext():
            (training.model(torch.randn(6, 5)).sum() * torch.inf).backward()
            training.optimizer.step()
        return generators()

    with pytest.warns(RuntimeWarning, match="non-finite"):
        watched = states(watched=True)
    assert watched == states(watched=False)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_fault_is_complained_about(observer: str, tmp_path: Path):
    training = ZOO["mlp"].begin(5)

    with (
        contextlib.suppress(nanhunt.NonFiniteStep),
        OBSERVERS[observer](training.model, training.optimizer, tmp_path) as observed,
    ):
        (training.model(torch.randn(6, 5)).sum() * 0).log().backward()
        training.optimizer.step()

    assert observed.complaints() != []


def _draw(model: nn.Module, optimizer: Optimizer) -> None:
    random.random()


def _nudge(model: nn.Module, optimizer: Optimizer) -> None:
    next(model.parameters()).register_hook(lambda gradient: gradient * (1 + 2**-23))


def _rewrite(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1)


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _patch(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    scale = torch.amp.GradScaler.scale
    torch.amp.GradScaler.scale = lambda *args: scale(*args)
    return lambda: setattr(torch.amp.GradScaler, "scale", scale)


def _hook_all(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    return register_module_forward_hook(lambda *args: None).remove


def _switch_on(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    mode = _Nothing()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def _hook_module(model: nn.Module, optimizer: Optimizer) -> None:
    next(model.children()).register_forward_pre_hook(lambda *args: None)


def _hook_step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.register_step_post_hook(lambda *args: None)


MISCHIEF = {
    _draw: {"generator python"},
    _rewrite: {"0.weight"},
    _patch: {"GradScaler.scale"},
    _hook_all: {"torch.nn.modules.module._global_forward_hooks"},
    _switch_on: {"dispatch modes"},
    _hook_module: {"0._forward_pre_hooks"},
    _hook_step: {"0._optimizer_step_post_hooks"},
    _nudge: {"0.weight", "0 gradient of 0.weight", "0.weight._backward_hooks"},
}


@pytest.mark.parametrize("mischief", MISCHIEF, ids=lambda mischief: mischief.__name__)
def test_the_comparison_sees_what_an_observer_does(mischief: Any):
    undo: list[Any] = []

    @contextlib.contextmanager
    def observer(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
        undo.append(mischief(model, optimizer))
        yield Observed(None, list)

    try:
        bad, good = run(ZOO["mlp"], observer), run_of("mlp")
    finally:
        if undo[0] is not None:
            undo[0]()
    seen = {*differences(bad.values, good.values), *bad.left, *differences(bad.hooks, good.hooks)}
    assert MISCHIEF[mischief] <= seen


def test_bits_tell_zeros_and_layouts_apart():
    zeros = torch.zeros(2, 2)

    assert bits(zeros) != bits(-zeros)
    assert bits(zeros) != bits(zeros.t())
    assert bits(torch.tensor(torch.nan)) == bits(torch.tensor(torch.nan))
    assert bits(zeros.to_sparse()) != bits(zeros)
