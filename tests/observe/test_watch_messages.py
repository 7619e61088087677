"""What the sentinel says of a fault is true, points at the user's line and fits the model a target builds."""

import linecache
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import nanhunt


def step(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    optimizer.zero_grad()
    model(torch.full((4, 3), value)).square().mean().backward()
    optimizer.step()  # mark: the loop's own line


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 1)


@pytest.fixture
def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_fault_that_could_not_be_saved_says_why(model: nn.Module, sgd: torch.optim.Optimizer, tmp_path: Path):
    (tmp_path / "debug").write_text("a file, not a folder")

    with pytest.raises(nanhunt.NonFiniteStep) as caught, nanhunt.watch(model, sgd, out_dir=tmp_path / "debug"):
        step(model, sgd, torch.nan)

    assert caught.value.capture is None
    assert f"not saved: cannot write the capture to {tmp_path / 'debug'}" in str(caught.value)


def test_fault_beyond_the_last_capture_does_not_ask_for_space(
    model: nn.Module, sgd: torch.optim.Optimizer, tmp_path: Path
):
    with pytest.raises(nanhunt.NonFiniteStep) as caught, nanhunt.watch(model, sgd, out_dir=tmp_path, max_captures=0):
        step(model, sgd, torch.nan)

    assert str(caught.value).endswith("not saved: this run has saved 0 captures already")


@pytest.mark.parametrize("on_fault", ["skip", "record"])
def test_warning_points_at_the_loops_own_line(
    on_fault: str, model: nn.Module, sgd: torch.optim.Optimizer, tmp_path: Path
):
    with warnings.catch_warnings(record=True) as caught, nanhunt.watch(model, sgd, out_dir=tmp_path, on_fault=on_fault):
        warnings.simplefilter("always")
        step(model, sgd, torch.nan)

    [warning] = caught
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).strip().endswith("# mark: the loop's own line")


@pytest.mark.parametrize("on_fault", ["raise", "skip", "record"])
def test_loop_that_ends_in_an_error_is_not_said_to_go_on(
    on_fault: str, model: nn.Module, sgd: torch.optim.Optimizer, tmp_path: Path
):
    def refused() -> None:
        model(torch.ones(4, 3))
        torch.linalg.cholesky(torch.zeros(2, 2))

    with (
        pytest.raises(torch.linalg.LinAlgError) as caught,
        nanhunt.watch(model, sgd, out_dir=tmp_path, on_fault=on_fault),
    ):
        refused()

    path = tmp_path / "bad_batch_000000.pt"
    assert caught.value.__notes__ == [f"nanhunt: saved {path}; run: nanhunt replay {path}"]


def test_loss_in_float64_is_kept_to_the_last_bit(tmp_path: Path):
    model = nn.Linear(3, 1, dtype=torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    losses = []

    def rooted() -> None:
        output = model(torch.zeros(4, 3, dtype=torch.float64))
        losses.append(output.mean() + (output * 0).sqrt().sum())
        losses[0].backward()
        sgd.step()

    with pytest.raises(nanhunt.NonFiniteStep), nanhunt.watch(model, sgd, out_dir=tmp_path):
        rooted()

    observed = nanhunt.read_capture(tmp_path / "bad_batch_000000.pt").meta["observed"]
    assert observed["loss"] == losses[0].item().hex()


def test_wrapped_model_is_kept_under_the_names_a_target_builds(tmp_path: Path):
    inner = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    model = nn.DataParallel(inner)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(nanhunt.NonFiniteStep), nanhunt.watch(model, sgd, out_dir=tmp_path):
        step(model, sgd, torch.nan)

    capture = nanhunt.read_capture(tmp_path / "bad_batch_000000.pt")
    assert sorted(capture.payload["model"]) == sorted([*dict(inner.named_parameters()), *dict(inner.named_buffers())])
    assert sorted(capture.payload["buffers_before"]) == sorted(dict(inner.named_buffers()))
    assert sorted(capture.meta["observed"]["gradient_checksums"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert capture.meta["model"]["class"] == "torch.nn.modules.container.Sequential"
