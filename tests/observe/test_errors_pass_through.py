"""An error raised anywhere in an observed loop comes out as it went in, and the observer is gone afterwards."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from observers import OBSERVERS, Observer, offending_module, unobserved
from surroundings import differences, generators, held, process
from torch import Tensor, nn
from zoo_entry import Training, mean_square, plain_step, rows
from zoo_run import hooks_on, seed_everything


class Breaks(nn.Module):
    """A layer that raises in its forward or its backward once it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.error = "", BaseException()

    def forward(self, rows: Tensor) -> Tensor:
        if self.where == "forward":
            raise self.error
        result = rows * 2
        if self.where == "backward":
            result.register_hook(self._in_backward)
        return result

    def _in_backward(self, gradient: Tensor) -> None:
        raise self.error


class BreakingAdamW(torch.optim.AdamW):
    """An optimizer that has moved some weights when it raises."""

    error: BaseException | None = None

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.error is not None:
            raise self.error
        return result


def training() -> Training:
    seed_everything(5)
    layers = (nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Sequential(Breaks()), nn.Linear(6, 1))
    model = nn.Sequential(*layers)
    return Training(model, BreakingAdamW(model.parameters(), lr=1e-2), mean_square)


def arm(run: Training, where: str, error: BaseException) -> Callable[[], None]:
    """Makes the next step raise; returns what to call in the loop itself."""
    run.model[3][0].where, run.model[3][0].error = where, error
    if where == "step":
        run.optimizer.error = error

    def in_loop() -> None:
        if where == "loop":
            raise error

    return in_loop


def break_off(run: Training, observer: Observer, where: str, error: BaseException, folder: Path) -> None:
    """Two good steps and one that raises."""
    with observer(run.model, run.optimizer, folder):
        plain_step(run, rows(0))
        plain_step(run, rows(1))
        in_loop = arm(run, where, error)
        plain_step(run, rows(2))
        in_loop()


def broken_run(observer: Observer, where: str, error: BaseException, folder: Path) -> tuple[Training, Any]:
    run = training()
    with pytest.raises(type(error)) as raised:
        break_off(run, observer, where, error, folder)
    return run, raised


TRACERS = ("trace", "focused")

each_place = pytest.mark.parametrize("where", ["forward", "backward", "step", "loop"])
each_error = pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
each_observer = pytest.mark.parametrize("observer", OBSERVERS)


@each_observer
@each_place
@each_error
def test_error_comes_out_as_it_went_in_and_nothing_is_left(observer: str, where: str, error: Any, tmp_path: Path):
    before, error = process(), error("on purpose")

    ours, raised = broken_run(OBSERVERS[observer], where, error, tmp_path)
    left = differences(process(), before)
    at_the_end = held(ours.model, ours.optimizer, {}) | generators()
    theirs, _ = broken_run(unobserved, where, error, tmp_path)

    assert raised.value is error
    assert left == []
    assert differences(hooks_on(ours), hooks_on(theirs)) == []
    assert differences(at_the_end, held(theirs.model, theirs.optimizer, {}) | generators()) == []
    assert list(tmp_path.iterdir()) == []


@each_observer
@each_place
@each_error
def test_a_loop_that_catches_the_error_goes_on_as_without_an_observer(
    observer: str, where: str, error: Any, tmp_path: Path
):
    def after(observer: Observer) -> tuple[dict[str, Any], list[str]]:
        run = training()
        with observer(run.model, run.optimizer, tmp_path) as observed:
            for number in range(4):
                with contextlib.suppress(error):
                    in_loop = arm(run, where if number == 1 else "", error("on purpose"))
                    plain_step(run, rows(number))
                    in_loop()
                run.optimizer.error = None
        return held(run.model, run.optimizer, {}) | generators(), observed.complaints()

    values, complaints = after(OBSERVERS[observer])

    assert differences(values, after(unobserved)[0]) == []
    assert complaints == []


@each_observer
def test_an_observer_that_is_entered_after_a_broken_run_works(observer: str, tmp_path: Path):
    run, _ = broken_run(OBSERVERS[observer], "backward", KeyboardInterrupt(), tmp_path)
    arm(run, "", BaseException())

    with OBSERVERS[observer](run.model, run.optimizer, tmp_path) as observed:
        loss = plain_step(run, rows(3))

    assert bool(loss.isfinite())
    assert observed.complaints() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fault_after_a_caught_error_is_placed_where_it_is(error: Any, tmp_path: Path):
    run = training()

    with OBSERVERS["trace"](run.model, run.optimizer, tmp_path) as observed:
        arm(run, "forward", error())
        with contextlib.suppress(error):
            plain_step(run, rows(0))
        arm(run, "", error())
        # Outside all modules, although the error came out of the middle of one.
        (run.model(rows(1)).sum() * 0).log().backward()
        run.optimizer.step()

    assert observed.complaints() != []
    assert offending_module(observed) == ""


@pytest.mark.parametrize("observer", OBSERVERS)
def test_weights_moved_before_the_backward_pass_are_refused_as_without_an_observer(observer: str, tmp_path: Path):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)

    def loop() -> None:
        model(rows(0)).sum().backward()
        loss = model(rows(1)).square().mean()
        optimizer.step()
        loss.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        observed_loop(OBSERVERS[observer], model, optimizer, tmp_path, loop)


def observed_loop(observer: Observer, model: nn.Module, optimizer: Any, folder: Path, loop: Callable[[], None]) -> None:
    with observer(model, optimizer, folder):
        loop()
