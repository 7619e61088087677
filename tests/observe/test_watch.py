"""The sentinel stops, skips or records a step before it can do harm, and keeps what a replay needs."""

import contextlib
import copy
import errno
import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.capture import format as capture_format

NAN, INF = math.nan, math.inf


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def batch(value: float = 1.0, *, bad: bool = False) -> Tensor:
    rows = value + torch.arange(12.0).reshape(4, 3)
    rows[1, 2] = NAN if bad else rows[1, 2]
    return rows


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(rows).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def stops() -> Iterator[Any]:
    """What runs inside must end with the fault."""
    with pytest.raises(nanhunt.NonFiniteStep) as caught:
        yield caught


@contextlib.contextmanager
def refuses() -> Iterator[Any]:
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        yield caught


@contextlib.contextmanager
def warns(match: str) -> Iterator[None]:
    with pytest.warns(RuntimeWarning, match=match):
        yield


@pytest.fixture
def model() -> nn.Module:
    return small_model()


@pytest.fixture
def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


# What happens at a fault.


def test_raise_stops_before_weights_and_moments_move(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt:
        one_step(model, adam, batch())
        before = everything(model, adam)
        with stops() as caught:
            one_step(model, adam, batch(bad=True))

    assert equal(everything(model, adam), before)
    assert (caught.value.step, caught.value.capture) == (1, str(tmp_path / "bad_batch_000001.pt"))
    assert str(caught.value) == (
        "step 1 is non-finite: loss nan, 6 of 6 gradients non-finite; "
        f"run: nanhunt replay {tmp_path / 'bad_batch_000001.pt'}"
    )
    assert [fault.step for fault in hunt.faults] == [1]


def test_skip_leaves_everything_as_it_was_and_training_goes_on(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path, on_fault="skip") as hunt:
        one_step(model, adam, batch())
        before = everything(model, adam)
        statistics = [buffer.clone() for buffer in model.buffers()]
        with warns(match=r"step 1 is non-finite.*; saved .*; skipped"):
            one_step(model, adam, batch(bad=True))
        assert equal(everything(model, adam), before)
        assert equal(list(model.buffers()), statistics)
        loss = one_step(model, adam, batch(2.0))

    assert math.isfinite(loss)
    assert not equal(everything(model, adam), before)
    assert (hunt.step, [fault.step for fault in hunt.faults]) == (3, [1])


def test_record_goes_on_with_the_step(model: nn.Module, adam: Any, tmp_path: Path):
    with (
        nanhunt.watch(model, adam, out_dir=tmp_path, on_fault="record"),
        warns(match="going on"),
    ):
        one_step(model, adam, batch(bad=True))

    assert all(parameter.isnan().any() for parameter in model.parameters())
    assert (tmp_path / "bad_batch_000000.pt").exists()


def test_a_run_that_stays_non_finite_does_not_fill_the_disk(model: nn.Module, adam: Any, tmp_path: Path):
    with (
        nanhunt.watch(model, adam, out_dir=tmp_path, on_fault="skip", max_captures=2) as hunt,
        warns(match="is non-finite"),
    ):
        for _ in range(4):
            one_step(model, adam, batch(bad=True))

    assert len(list(tmp_path.iterdir())) == 2
    assert len(hunt.faults) == 4
    assert hunt.faults[-1].problem == "this run has saved 2 captures already"


def test_what_to_do_at_a_fault_is_one_of_three(model: nn.Module, adam: Any):
    with pytest.raises(ValueError, match="on_fault is 'raise', 'skip' or 'record', not 'ignore'"):
        nanhunt.watch(model, adam, on_fault="ignore")


def test_infinite_loss_with_finite_gradients_is_a_fault(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path), stops() as caught:
        (model(batch()).sum() + INF).backward()
        adam.step()

    assert caught.value.message == "step 0 is non-finite: loss inf, 0 of 6 gradients non-finite"


def test_finite_loss_with_a_non_finite_gradient_is_a_fault(tmp_path: Path):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    with nanhunt.watch(model, sgd, out_dir=tmp_path), stops() as caught:
        model(torch.ones(1, 2)).sqrt().sum().backward()
        sgd.step()

    assert caught.value.message == "step 0 is non-finite: loss 0 (finite), 1 of 1 gradients non-finite"


def test_large_values_whose_sum_overflows_are_no_fault(tmp_path: Path):
    weight = nn.Parameter(torch.zeros(4))
    model = nn.Module()
    model.weight = weight
    sgd = torch.optim.SGD([weight], lr=1e-38)

    with nanhunt.watch(model, sgd, out_dir=tmp_path) as hunt:
        weight.grad = torch.full((4,), 3e38)
        sgd.step()

    assert len(hunt.faults) == 0


def test_sparse_gradient_is_judged(tmp_path: Path):
    table = nn.Embedding(3, 2, sparse=True)
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.SparseAdam(table.parameters())

    with nanhunt.watch(table, optimizer, out_dir=tmp_path), stops():
        table(torch.tensor([1])).sqrt().sum().backward()
        optimizer.step()

    assert bool(table.weight.isfinite().all())


# The capture file.


def test_file_is_named_by_the_step_and_never_overwritten(tmp_path: Path):
    for _ in range(3):
        model = small_model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with nanhunt.watch(model, sgd, out_dir=tmp_path, start_step=7), stops():
            one_step(model, sgd, batch(bad=True))

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bad_batch_000007-1.pt", "bad_batch_000007-2.pt", "bad_batch_000007.pt"]


def test_capture_holds_the_state_before_the_step(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt:
        one_step(model, adam, batch())
        before = copy.deepcopy((model.state_dict(), adam.state_dict()))
        with stops():
            for rows in hunt.batches([batch(bad=True)]):
                one_step(model, adam, rows)

    payload = nanhunt.read_capture(tmp_path / "bad_batch_000001.pt").payload
    for name, _ in model.named_parameters():
        assert torch.equal(payload["model"][name], before[0][name])
    for name, _ in model.named_buffers():
        assert torch.equal(payload["buffers_before"][name], before[0][name])
    for key, state in before[1]["state"].items():
        assert torch.equal(payload["optimizer"]["state"][key]["exp_avg"], state["exp_avg"])
    assert torch.equal(payload["batches"][0].isnan(), batch(bad=True).isnan())


def test_folder_that_cannot_be_written_is_said_and_the_fault_still_raised(model: nn.Module, adam: Any, tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")

    with nanhunt.watch(model, adam, out_dir=blocked / "debug") as hunt:
        before = everything(model, adam)
        with stops() as caught:
            one_step(model, adam, batch(bad=True))

    assert caught.value.capture is None
    assert hunt.faults[0].problem.startswith(f"cannot write the capture to {blocked / 'debug'}")
    assert equal(everything(model, adam), before)


def test_full_disk_leaves_no_half_written_file(
    model: nn.Module, adam: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fills_the_disk(content: Any, file: Any) -> None:
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"PK half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(capture_format.torch, "save", fills_the_disk)

    with (
        nanhunt.watch(model, adam, out_dir=tmp_path, on_fault="skip"),
        warns(match="not saved: .*No space left on device.*; skipped"),
    ):
        one_step(model, adam, batch(bad=True))

    assert list(tmp_path.iterdir()) == []


def test_batch_that_is_no_plain_data_is_left_out_and_the_rest_kept(model: nn.Module, adam: Any, tmp_path: Path):
    class Recording:
        rows = batch(bad=True)

    with (
        nanhunt.watch(model, adam, out_dir=tmp_path) as hunt,
        warns(match="the batch is not kept: cannot store a Recording"),
        stops(),
    ):
        for recording in hunt.batches([Recording()]):
            one_step(model, adam, recording.rows)

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000000.pt")
    assert (capture.batches, len(capture.payload["calls"])) == ([], 1)


def test_control_batch_that_is_no_plain_data_does_not_cost_the_capture(model: nn.Module, adam: Any, tmp_path: Path):
    class Recording:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

    def loader() -> Iterator[Any]:
        yield Recording(batch())
        yield batch(bad=True)

    with (
        nanhunt.watch(model, adam, out_dir=tmp_path) as hunt,
        warns(match="the control batch is not kept"),
        stops(),
    ):
        for rows in hunt.batches(loader()):
            one_step(model, adam, getattr(rows, "rows", rows))

    assert len(nanhunt.read_capture(tmp_path / "bad_batch_000001.pt").batches) == 1


def test_control_batch_is_that_of_the_last_healthy_step(model: nn.Module, adam: Any, tmp_path: Path):
    loader = [batch(1.0), batch(2.0), batch(3.0, bad=True), batch(4.0, bad=True)]

    with (
        nanhunt.watch(model, adam, out_dir=tmp_path, on_fault="skip") as hunt,
        warns(match="skipped"),
    ):
        for rows in hunt.batches(loader):
            one_step(model, adam, rows)

    for step in (2, 3):
        [control] = nanhunt.read_capture(tmp_path / f"bad_batch_{step:06d}.pt").payload["control"]
        assert torch.equal(control, loader[1])


# What belongs to a step.


def test_both_batches_of_an_accumulated_step_are_kept(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt, stops():
        for position, rows in enumerate(hunt.batches([batch(1.0), batch(2.0), batch(3.0), batch(4.0, bad=True)])):
            (model(rows).square().mean() / 2).backward()
            if position % 2:
                adam.step()
                adam.zero_grad()

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000001.pt")
    assert [float(rows[0, 0]) for rows in capture.batches] == [3.0, 4.0]
    assert [len(call["output_grads"]) for call in capture.payload["calls"]] == [1, 1]
    assert capture.meta["num_micro_steps"] == 2


def test_two_backward_passes_over_one_forward_are_one_step(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt, stops():
        for rows in hunt.batches([batch(bad=True)]):
            output = model(rows)
            output.sum().backward(retain_graph=True)
            output.square().sum().backward()
            adam.step()

    assert len(nanhunt.read_capture(tmp_path / "bad_batch_000000.pt").batches) == 1


ZEROED = {
    "before the forward": lambda adam, model: adam.zero_grad(),
    "kept as zeros": lambda adam, model: adam.zero_grad(set_to_none=False),
    "by the model": lambda adam, model: model.zero_grad(),
}


@pytest.mark.parametrize("how", ZEROED)
@pytest.mark.parametrize("is_late", [False, True])
def test_step_that_the_loop_dropped_is_no_part_of_the_next(how: str, is_late: bool, tmp_path: Path):
    model = small_model()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = [batch(1.0), batch(2.0, bad=True), batch(3.0), batch(4.0, bad=True)]

    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt:
        for position, rows in enumerate(hunt.batches(loader)):
            if not is_late:
                ZEROED[how](adam, model)
            model.eval()
            loss = model(rows).square().mean()
            if is_late:
                ZEROED[how](adam, model)
            loss.backward()
            if position == 1:
                continue
            if position == 3:
                with stops():
                    adam.step()
            else:
                adam.step()

    [fault] = hunt.faults
    [kept] = nanhunt.read_capture(fault.capture).batches
    assert (fault.step, float(kept[0, 0])) == (2, 4.0)


def test_batch_the_loop_did_not_pass_backward_is_left_out(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt, stops():
        for rows in hunt.batches([batch(1.0, bad=True), batch(2.0)]):
            model.eval()
            loss = model(rows).square().mean()
            if not loss.isfinite():
                continue
            (loss * INF).backward()
            adam.step()

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000000.pt")
    assert [float(rows[0, 0]) for rows in capture.batches] == [2.0]


def amp_loop(model: nn.Module, optimizer: torch.optim.Optimizer, hunt: Any, scaler: Any, losses: list[float]) -> None:
    for rows, extra in hunt.batches([(batch(float(n)), extra) for n, extra in enumerate(losses)]):
        optimizer.zero_grad()
        loss = model(rows).square().mean() + model[0].weight.sum() * extra
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_that_the_loss_scaler_skips_is_no_fault(fused: bool, tmp_path: Path):
    model = small_model()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000)

    with nanhunt.watch(model, adam, out_dir=tmp_path, scaler=scaler) as hunt:
        amp_loop(model, adam, hunt, scaler, [0.0, 1e20, 0.0])

    assert len(hunt.faults) == 0
    assert scaler.get_scale() < 2.0**100
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_loss_of_a_scaled_step_is_noted_without_its_scale(tmp_path: Path):
    weight = nn.Linear(1, 1, bias=False)
    sgd = torch.optim.SGD(weight.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    with nanhunt.watch(weight, sgd, out_dir=tmp_path, scaler=scaler) as hunt:
        loss = weight(torch.ones(1, 1)).sum() * 0 + 3.0
        scaler.scale(loss).backward()
        weight.weight.grad.fill_(NAN)
        with stops():
            sgd.step()

    assert hunt.faults[0].loss == 3.0


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closure_of_an_optimizer_is_judged_every_time(as_keyword: bool, tmp_path: Path):
    model = nn.Linear(3, 1)
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    evaluations = []

    with nanhunt.watch(model, lbfgs, out_dir=tmp_path) as hunt, stops():
        for rows in hunt.batches([torch.ones(4, 3)]):

            def closure(rows: Tensor = rows) -> Tensor:
                evaluations.append(0)
                lbfgs.zero_grad()
                loss = model(rows).square().sum() * (INF if len(evaluations) == 3 else 1.0)
                loss.backward()
                return loss

            lbfgs.step(closure=closure) if as_keyword else lbfgs.step(closure)

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000000.pt")
    assert len(evaluations) == 3
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert (len(capture.batches), len(capture.payload["calls"])) == (1, 1)
    assert capture.meta["observed"]["loss"] == "inf"


def test_closure_may_still_return_its_loss(model: nn.Module, tmp_path: Path):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        sgd.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        return loss

    with nanhunt.watch(model, sgd, out_dir=tmp_path) as hunt:
        loss = sgd.step(closure)

    assert math.isfinite(loss.detach())
    assert hunt.step == 1


# A loop that ends in an error.


def test_decomposition_that_refuses_its_input_is_captured(tmp_path: Path):
    model = nn.Linear(3, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    with refuses() as caught, nanhunt.watch(model, sgd, out_dir=tmp_path) as hunt:
        for rows in hunt.batches([torch.eye(3), torch.full((3, 3), NAN)]):
            sgd.zero_grad()
            torch.linalg.eigvalsh(model(rows)).sum().backward()
            sgd.step()

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000001.pt")
    assert capture.meta["observed"]["crash"].startswith("linalg.eigh")
    assert [bool(rows.isnan().all()) for rows in capture.batches] == [True]
    assert caught.value.__notes__ == [
        f"nanhunt: saved {hunt.faults[0].capture}; run: nanhunt replay {hunt.faults[0].capture}"
    ]
    assert hunt.faults[0].message.startswith("step 1 ended in an error: linalg.eigh")


def test_other_errors_leave_no_capture(model: nn.Module, adam: Any, tmp_path: Path):
    with pytest.raises(KeyError), nanhunt.watch(model, adam, out_dir=tmp_path):
        raise KeyError("x")

    assert list(tmp_path.iterdir()) == []


# What it costs.


def test_loop_without_gradients_keeps_nothing(model: nn.Module, adam: Any, tmp_path: Path):
    held = []
    model.eval()

    with nanhunt.watch(model, adam, out_dir=tmp_path), torch.no_grad():
        for _ in range(20):
            rows = batch()
            held.append(weakref.ref(rows))
            model(rows)
        del rows
        gc.collect()
        alive = sum(reference() is not None for reference in held)

    assert alive == 0


def test_loop_that_never_steps_keeps_a_bounded_number_of_batches(model: nn.Module, adam: Any, tmp_path: Path):
    held = []

    def loader() -> Iterator[Tensor]:
        for _ in range(200):
            rows = batch()
            held.append(weakref.ref(rows))
            yield rows

    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt:
        for rows in hunt.batches(loader()):
            model(rows)
        gc.collect()
        alive = sum(reference() is not None for reference in held)

    assert alive <= 65


def test_batches_are_kept_by_reference_and_let_go_after_the_step(model: nn.Module, adam: Any, tmp_path: Path):
    rows = batch()

    with nanhunt.watch(model, adam, out_dir=tmp_path) as hunt:
        [given] = list(hunt.batches([rows]))
        loss = model(given).square().mean()
        (kept,), (call,), _ = hunt._kept.taking_part(ended_in_error=False)
        assert given is rows
        assert kept.data_ptr() == call.args[0].data_ptr() == rows.data_ptr()
        loss.backward()
        adam.step()
        assert len(hunt._kept.calls) == 0


def test_input_that_the_loop_overwrote_is_said(model: nn.Module, adam: Any, tmp_path: Path):
    rows = batch(bad=True)

    with nanhunt.watch(model, adam, out_dir=tmp_path), stops():
        loss = model(rows).square().mean()
        loss.backward()
        rows.zero_()
        adam.step()

    assert nanhunt.read_capture(tmp_path / "bad_batch_000000.pt").meta["inputs_modified"] is True


def test_module_tracer_names_the_module_in_the_error(model: nn.Module, adam: Any, tmp_path: Path):
    with nanhunt.watch(model, adam, out_dir=tmp_path, trace_finite=True) as hunt:
        one_step(model, adam, batch())
        with torch.no_grad():
            model[4].bias.fill_(INF)
        with stops() as caught:
            one_step(model, adam, batch())

    assert hunt.faults[0].module_fault.modules == ("4",)
    assert caught.value.module_message.startswith("first non-finite output: 4")
