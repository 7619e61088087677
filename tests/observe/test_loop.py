"""What ``nanhunt.trace`` says beside the place of a fault: what the loop dealt with, steps, where the block ends."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_loops import facts, length, linear, rows, sgd, traced, train
from torch import Tensor, nn

import nanhunt

# What the loop dealt with by itself is counted.


def test_losses_that_the_loop_dropped_are_counted():
    model = linear()
    optimizer = sgd(model)

    def loop() -> None:
        for gain in (1.0, 0.0, 0.0, 1.0):
            loss = (model(rows()).square() * gain).mean().log()
            if not loss.isfinite():
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    report = traced(loop, model, optimizer)

    assert report.first is None
    assert facts(report)["non-finite losses that the loop dropped"] == "2"
    assert facts(report)["steps"] == "2"


def test_outputs_that_the_loop_dropped_are_counted():
    class LogLength(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).square().sum(1).log()

    model = LogLength()
    optimizer = sgd(model)

    def loop() -> None:
        for is_bad in (False, True, False):
            output = model(rows(is_bad=is_bad))
            if is_bad:
                continue
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()

    report = traced(loop, model, optimizer)

    assert report.first is None
    assert facts(report)["non-finite losses that the loop dropped"] == "1"


def test_steps_that_the_loop_dropped_for_their_gradients_are_counted():
    model = linear()
    optimizer = sgd(model)

    def loop() -> None:
        for is_bad in (False, True, False, True, False):
            length(model, rows(is_bad=is_bad)).backward()
            if model.weight.grad.isfinite().all():
                optimizer.step()
            optimizer.zero_grad()

    report = traced(loop, model, optimizer)

    assert report.first is None
    assert facts(report)["non-finite steps that the loop dropped"] == "2"
    assert facts(report)["steps"] == "3"


def test_steps_that_a_scaler_skipped_are_counted():
    model = linear()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    num_skipped = 0

    def loop() -> None:
        nonlocal num_skipped
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(4 * model(rows()).square().mean()).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            num_skipped += scaler.get_scale() < scale

    report = traced(loop, model, optimizer)

    assert 0 < num_skipped < 6
    assert report.first is None
    assert set(facts(report)) == {"steps", "operations", "steps that the GradScaler skipped"}
    assert facts(report)["steps that the GradScaler skipped"] == str(num_skipped)


def test_a_healthy_loop_has_no_notes_and_no_skips():
    model = linear()
    optimizer = sgd(model)

    report = traced(lambda: train(model, optimizer, [False] * 3), model, optimizer)

    assert report.first is None
    assert report.skips == ()
    assert set(facts(report)) == {"steps", "operations"}


# Steps.


@pytest.mark.parametrize(("num_after", "is_passive"), [(0, False), (1, True), (4, True)])
def test_the_trace_goes_passive_after_the_step_that_follows_the_fault(num_after: int, is_passive: bool):
    model = linear()
    optimizer = sgd(model)

    report = traced(lambda: train(model, optimizer, [False, True] + [False] * num_after), model, optimizer)

    assert report.first.location.step == 1
    assert ("the steps after the fault" in [skip.what for skip in report.skips]) == is_passive


def test_a_passive_trace_records_no_more_operations():
    def num_operations(num_after: int) -> int:
        model = linear()
        optimizer = sgd(model)
        report = traced(lambda: train(model, optimizer, [True] + [False] * num_after), model, optimizer)
        return int(facts(report)["operations"].replace(",", ""))

    assert num_operations(1) == num_operations(6) > num_operations(0)


@pytest.mark.parametrize("part", [0, 1, 3])
def test_the_part_of_an_accumulated_step_is_named(part: int):
    model = linear()
    optimizer = sgd(model)

    def loop() -> None:
        for step in range(3):
            optimizer.zero_grad()
            for number in range(4):
                length(model, rows(is_bad=(step, number) == (1, part))).backward()
            optimizer.step()

    where = traced(loop, model, optimizer).first.location

    assert (where.phase, where.step, where.micro_step) == ("backward", 1, part)


# The block, and its end.


def test_a_report_can_be_asked_for_inside_the_block():
    model = linear()
    optimizer = sgd(model)

    with nanhunt.trace(model, optimizer) as hunt:
        train(model, optimizer, [False, False])
        before = hunt.report()
        train(model, optimizer, [True])
        after = hunt.report()
        train(model, optimizer, [False])

    assert before.first is None
    assert facts(before)["steps"] == "2"
    assert after.first == hunt.report().first
    assert after.first.location.step == 2


def test_an_empty_block_has_an_empty_report():
    report = traced(lambda: None, linear())

    assert report.findings == ()
    assert report.first is None
    assert report.chain == ()
    assert report.skips == ()
    assert facts(report) == {"steps": "0", "operations": "0"}
    assert report.verdict.sentences == ("no non-finite value did harm",)


def test_an_exception_in_the_block_passes_through_and_is_named_in_the_report():
    model = linear()
    optimizer = sgd(model)
    error = KeyError("no such batch")
    hunt = nanhunt.trace(model, optimizer)

    def loop() -> None:
        train(model, optimizer, [True])
        raise error

    with pytest.raises(KeyError) as raised, hunt:
        loop()

    assert raised.value is error
    assert facts(hunt.report())["ended in"] == "KeyError: 'no such batch'"
    assert hunt.report().first.location.phase == "backward"


def test_a_refused_matrix_has_its_rule_and_its_line():
    class Invert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(3, 3))

        def forward(self) -> Tensor:
            return torch.linalg.inv(self.matrix)  # the line

    model = nn.Sequential(Invert())
    hunt = nanhunt.trace(model)

    with pytest.raises(torch.linalg.LinAlgError), hunt:
        model[0]()

    first = hunt.report().first
    assert (first.code, first.location.phase, first.location.op) == ("NH106", "forward", "aten::linalg_inv")
    assert first.location.module == "0"
    assert first.location.source.text.endswith("# the line")


def test_a_refused_matrix_is_no_finding_where_the_loop_tries_again():
    def loop() -> None:
        try:
            torch.linalg.cholesky(torch.zeros(2, 2))
        except torch.linalg.LinAlgError:
            torch.linalg.cholesky(torch.eye(2))

    assert traced(loop, linear()).first is None


# One trace after another.


def test_a_second_trace_of_the_same_model_starts_anew():
    model = linear()
    optimizer = sgd(model)
    train(model, optimizer, [False])

    bad = traced(lambda: evaluate_log(model), model)
    good = traced(lambda: train(model, optimizer, [False, False]), model, optimizer)

    assert bad.first.location.op == "aten::log"
    assert good.first is None
    assert facts(good)["steps"] == "2"


def evaluate_log(model: nn.Module) -> None:
    """A loss of log 0, which the loop ends on."""
    (model(rows()).sum() * 0).log().backward()
    model.zero_grad()


def test_what_the_first_trace_has_seen_go_bad_is_a_weight_to_the_second():
    model = linear()
    optimizer = sgd(model)

    first = traced(lambda: train(model, optimizer, [False, True]), model, optimizer).first
    second = traced(lambda: train(model, optimizer, [False]), model, optimizer).first

    assert (first.location.phase, first.location.step) == ("backward", 1)
    assert (second.location.phase, second.location.step) == ("weights", 0)
    assert second.location.tensor == "weight"


@pytest.fixture
def generators() -> Callable[[], tuple[object, ...]]:
    """What the three global generators draw next."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)  # noqa: NPY002 - the global generator is one of those a loop can draw from
    return lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize("is_bad", [False, True])
def test_random_numbers_are_those_of_the_loop_alone(is_bad: bool, generators: Callable[[], tuple[object, ...]]):
    def states(*, is_traced: bool) -> tuple[object, ...]:
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2, bias=False))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(12)
        if is_traced:
            traced(lambda: train(model, optimizer, [False, is_bad, False]), model, optimizer)
        else:
            train(model, optimizer, [False, is_bad, False])
        return generators()

    assert states(is_traced=True) == states(is_traced=False)


def test_values_of_a_dropped_step_leave_no_fault_for_later():
    model = linear()
    optimizer = sgd(model)

    def loop() -> None:
        for step in range(6):
            optimizer.zero_grad()
            length(model, rows(is_bad=step in (1, 4))).backward()
            if step != 1:
                optimizer.step()

    where = traced(loop, model, optimizer).first.location

    assert (where.phase, where.step) == ("backward", 3)


def test_a_loss_that_goes_backward_twice_is_one_finding():
    model = linear()
    optimizer = sgd(model)
    target = torch.full((5, 2), math.nan)

    def loop() -> None:
        loss = F.mse_loss(model(rows()), target)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    report = traced(loop, model, optimizer)

    assert [finding.location.phase for finding in report.findings] == ["data"]
