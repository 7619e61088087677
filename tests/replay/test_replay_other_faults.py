"""Replays of steps that fail in other ways: refused, overflowing, masked, behind the model, in a buffer only."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_step import Gated, Tiny, batch, reasons, rewritten, train
from torch import Tensor, nn

import nanhunt

INF = math.inf


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A step that failed after a healthy one."""
    return train(tmp_path, Tiny(), [batch(), batch(bad=True)])


def test_refused_matrix_without_any_non_finite_value_is_said_to_end_in_its_error(tmp_path: Path):
    class Factored(Tiny):
        max_grad_norm = None

        def loss(self, model: nn.Module, one: Any) -> Tensor:
            hidden = model(one["rows"], one["gate"]) * one["gate"].min()
            return torch.linalg.cholesky(hidden.mT @ hidden).sum()

    path = train(tmp_path, Factored(), [batch(bad=True)], clips=False)
    report = nanhunt.replay(path, target=Factored(), num_seeds=0)

    assert report.findings == ()
    assert dict(report.facts)["ended in"].startswith("_LinAlgError: linalg.cholesky")
    assert "loss" not in dict(report.facts)
    assert report.verdict.sentences[0].startswith(
        "no operation made a non-finite value that did harm before the step ended in _LinAlgError: linalg.cholesky"
    )


def test_loss_of_a_model_replayed_alone_is_not_given_as_a_number(capture: Path):
    class BuildOnly:
        def build(self, seed: int) -> nn.Module:
            return Gated()

    report = nanhunt.replay(capture, target=BuildOnly())

    assert dict(report.facts)["loss"] == "not computed: only the model is replayed"
    assert reasons(report)["weights against batches"] == (
        "target BuildOnly has no loss(model, batch): only the model's own inputs are replayed"
    )


def test_fault_of_the_loss_is_not_blamed_on_an_earlier_step(tmp_path: Path):
    class Rooted(Tiny):
        max_grad_norm = None

        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return (model(one["rows"], torch.ones(5)).square().sum(-1) * one["gate"] * 0).sqrt().mean()

    class BuildOnly:
        def build(self, seed: int) -> nn.Module:
            return Gated()

    report = nanhunt.replay(train(tmp_path, Rooted(), [batch()], clips=False), target=BuildOnly())

    assert (report.first.code, report.first.location.phase) == ("NH602", "backward")
    assert report.first.message.startswith("gradient of output 0 holds 10 NaN among 10 elements as the loss gave it")
    assert report.chain[0].what == "gradient of output 0"
    experiments = {result.name: result for result in report.experiments}
    assert experiments["float64"].outcome.failed_phase == "backward"


def test_overflow_that_float64_has_room_for_is_not_called_rounding(tmp_path: Path):
    class Exponential(Tiny):
        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return (model(one["rows"], torch.ones(5)) * 0 + one["rows"][:, :2] * 0 + 100).exp().mean()

    report = nanhunt.replay(train(tmp_path, Exponential(), [batch()]), target=Exponential(), num_seeds=0)

    assert (report.first.code, report.first.message) == (
        "NH107",
        "exp of up to 100 at 10 elements, first at [0, 0]; float32 holds exp up to 88.7228",
    )
    assert (
        "the whole step in float64 is finite: it hangs on the range or the rounding of the captured types"
        in report.verdict.sentences
    )
    [wide] = [result.outcome for result in report.experiments if result.name == "float64"]
    assert math.isfinite(wide.gradient_norm)


def test_mask_that_no_row_survives_is_not_called_finite_input(tmp_path: Path):
    class Masked(Tiny):
        def loss(self, model: nn.Module, one: Any) -> Tensor:
            scores = model(one["rows"], torch.ones(5)).masked_fill(one["gate"][:, None] == 0, -INF)
            return (scores - scores.max(-1, keepdim=True).values).exp().sum()

    report = nanhunt.replay(train(tmp_path, Masked(), [batch(bad=True)]), target=Masked(), num_seeds=0)

    assert report.first.code == "NH105"
    assert report.first.message == "aten::sub over 1 row that is -inf throughout, first at [2, 0]"


def test_buffer_that_fills_with_nan_is_not_called_a_finite_step(tmp_path: Path):
    class Counting(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, rows: Tensor, gate: Tensor) -> Tensor:
            self.mean = torch.log(gate.detach().min() - 1)
            return self.head(self.first(rows).tanh())

    class Counted(Tiny):
        def build(self, seed: int) -> nn.Module:
            return Counting()

    path = train(tmp_path, Tiny(), [batch(bad=True)])
    counting = rewritten(path, tmp_path / "other", lambda payload: payload.update(buffers_before={}))
    report = nanhunt.replay(counting, target=Counted(), num_seeds=0)

    assert report.baseline.is_finite
    assert report.verdict.sentences == (
        "log-of-nonpositive: loss, gradients and weights stay finite, a buffer or the optimizer's state does not",
    )


def test_batch_that_comes_back_as_a_plain_tuple_is_refused_with_the_reason(tmp_path: Path):
    class Pair(NamedTuple):
        rows: Tensor
        gate: Tensor

    class Named(Tiny):
        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return model(one.rows, one.gate).square().mean()

    path = train(tmp_path, Named(), [Pair(**batch(bad=True))])

    with pytest.raises(nanhunt.TargetError, match="a named tuple comes back as a tuple"):
        nanhunt.replay(path, target=Named())


def test_model_whose_outputs_gave_no_gradient_is_not_called_finite(tmp_path: Path):
    @dataclass
    class Output:
        scores: Tensor

    class Wrapped(Gated):
        def forward(self, rows: Tensor, gate: Tensor) -> Output:
            return Output(super().forward(rows, gate))

    class BuildOnly:
        def build(self, seed: int) -> nn.Module:
            return Wrapped()

    class Whole(BuildOnly, Tiny):
        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return model(one["rows"], one["gate"]).scores.square().mean()

    path = train(tmp_path, Whole(), [batch(bad=True)])

    assert nanhunt.replay(path, target=Whole(), num_seeds=0).first.code == "NH202"
    with pytest.raises(nanhunt.TargetError, match="holds no gradient of the model's outputs"):
        nanhunt.replay(path, target=BuildOnly())
