"""The exit code of a replay says what was found, also where no operation is to blame or Ctrl-C came."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nanhunt
from nanhunt.cli import app as program

TARGET = """
import torch
from torch import nn

class Factored:
    def build(self, seed):
        return nn.Linear(3, 3)

    def loss(self, model, batch):
        return torch.linalg.cholesky(model(batch["rows"]) * batch["scale"] + torch.eye(3)).sum()

class Stopped(Factored):
    def loss(self, model, batch):
        raise KeyboardInterrupt

factored, stopped = Factored(), Stopped()
"""


@pytest.fixture
def capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A step that ended in a refused matrix, without anything non-finite in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "factored.py").write_text(TARGET)
    model = nn.Linear(3, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        for rows in hunt.batches([{"rows": torch.ones(3, 3), "scale": torch.tensor(-1e6)}]):
            torch.linalg.cholesky(model(rows["rows"]) * rows["scale"] - torch.eye(3))

    with pytest.raises(torch.linalg.LinAlgError), nanhunt.watch(model, sgd, out_dir="debug") as hunt:
        loop()
    yield str(hunt.faults[0].capture)
    sys.modules.pop("factored", None)


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["nanhunt", "replay", *args, "--seeds", "0"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    return ended.value.code


def test_step_that_ends_in_an_error_is_a_fault(
    capture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, capture, "--target", "factored:factored") == 1

    out = capsys.readouterr().out
    assert "ended in     _LinAlgError: linalg.cholesky" in out
    assert "the step is not finite, but no operation was found that began it" in out
    assert "loss " not in out


def test_ctrl_c_before_the_step_has_run_is_not_a_clean_bill(
    capture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, capture, "--target", "factored:stopped") == 130
    assert "the rest of the replay: interrupted" in capsys.readouterr().out


def test_class_in_place_of_an_instance_is_told_apart(
    capture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, capture, "--target", "factored:Factored") == 2
    assert "  help: it is a class: name an instance of it, as in `target = Target()`" in capsys.readouterr().err
