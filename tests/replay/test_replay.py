"""A whole replay: the chain, the grid, the experiments and what the verdict makes of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_step import Gated, Tiny, batch, reasons, rewritten, train
from torch import Tensor, nn

import nanhunt
from nanhunt.capture.checkpoint import read_checkpoint

NAN = math.nan


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """A step that failed after a healthy one."""
    return train(tmp_path, Tiny(), [batch(), batch(bad=True)])


# The finding and what follows from it.


def test_offender_is_named_with_the_users_line(capture: Path):
    finding = nanhunt.replay(capture, target=Tiny(), num_seeds=0).first

    assert (finding.code, finding.certainty) == ("NH202", "tested")
    assert (finding.location.phase, finding.location.forward_op) == ("backward", "aten::sqrt")
    assert finding.location.source.text == "root = (hidden.square().sum(-1) * gate).sqrt()"
    assert finding.message == "gradient of sqrt at 0 for 1 element, first at [2]"


def test_chain_counts_from_the_offender_to_the_next_forward(capture: Path):
    chain = [(link.what, link.detail) for link in nanhunt.replay(capture, target=Tiny(), num_seeds=0).chain]

    assert chain[0] == ("aten::div in the backward of aten::sqrt", "1 of 5 elements")
    assert chain[1][0] == "later operations"
    assert chain[2:] == [
        ("parameter gradients", "2 of 4 tensors (16 of 26 elements)"),
        ("after clip_grad_norm_", "4 of 4 tensors (26 of 26 elements)"),
        ("weights after the step", "4 of 4 tensors (26 of 26 elements)"),
        ("next forward", "10 of 10 outputs"),
    ]


def test_grid_crosses_weights_with_batches(capture: Path):
    grid = nanhunt.replay(capture, target=Tiny(), num_seeds=2).grid

    assert [(cell.weights, cell.batch, cell.seed, cell.outcome.failed_phase) for cell in grid] == [
        ("captured", "bad", None, "backward"),
        ("captured", "control", None, None),
        ("fresh", "bad", 0, "backward"),
        ("fresh", "control", 0, None),
        ("fresh", "bad", 1, "backward"),
        ("fresh", "control", 1, None),
    ]


def test_experiments_flip_what_touches_the_root_and_nothing_else(capture: Path):
    verdict = nanhunt.replay(capture, target=Tiny(), num_seeds=0).verdict

    assert verdict.flipped == ("detach-offender", "replace-sample-2", "sanitise-gradients")
    assert verdict.unmoved == (
        *("replace-sample-0", "replace-sample-1", "replace-sample-3", "replace-sample-4"),
        *("decay-groups", "lower-learning-rate", "clamp-offender", "clamp-outputs", "float64"),
    )


def test_verdict_says_what_was_tried_and_no_more(capture: Path):
    verdict = nanhunt.replay(capture, target=Tiny(), num_seeds=1).verdict

    assert verdict.certainty == "tested"
    assert verdict.sentences == (
        "root-gradient-at-zero: the step becomes finite with no gradient through sqrt (its outputs detached)",
        "still non-finite: no weight decay on norms and biases (groups by name); learning rate divided by 10; "
        "outputs of sqrt clamped to [-10, 10]; the model's outputs clamped to [-40, 40]",
        "finite, but a mask: nan_to_num on the gradients",
        "the whole step in float64 is non-finite as well",
        "finite with sample 2 replaced by a control sample",
        "on fresh weights the same batch is finite with 0 of 1 seeds",
        "on these weights the control batch is finite",
    )


def test_sanitised_gradients_are_shown_with_their_zeros_and_their_note(capture: Path):
    experiments = nanhunt.replay(capture, target=Tiny(), num_seeds=0).experiments
    [sanitised] = [result for result in experiments if result.name == "sanitise-gradients"]

    assert (sanitised.outcome.num_zero_gradients, sanitised.outcome.gradients.num_tensors) == (2, 4)
    assert sanitised.note == "the gradients are still wrong: what was non-finite is now 0"


# Whether it was the captured step.


def test_same_step_is_bit_identical(capture: Path):
    determinism = nanhunt.replay(capture, target=Tiny(), num_seeds=0).determinism

    assert (determinism.status, determinism.detail) == ("bit-identical", "loss and 4 of 4 gradients")


def test_other_batch_differs(capture: Path, tmp_path: Path):
    other = rewritten(capture, tmp_path / "other", lambda payload: payload["batches"][0]["rows"].mul_(2))

    assert nanhunt.replay(other, target=Tiny(), num_seeds=0).determinism.status == "differs"


def test_clipping_that_the_target_does_not_name_is_hinted_at(tmp_path: Path):
    class Unclipped(Tiny):
        max_grad_norm = None

    determinism = nanhunt.replay(
        train(tmp_path, Tiny(), [batch(bad=True)]), target=Unclipped(), num_seeds=0
    ).determinism

    assert determinism.status == "differs"
    assert determinism.detail == (
        "loss equal, 2 of 4 gradients, first head.weight; "
        "the target names no max_grad_norm: if the loop clips, so must the replay"
    )


def test_weights_of_a_checkpoint_are_nothing_to_compare_with(capture: Path, tmp_path: Path):
    torch.save(Gated().state_dict(), tmp_path / "last.pt")

    report = nanhunt.replay(capture, target=Tiny(), checkpoint=tmp_path / "last.pt", num_seeds=0)

    assert report.determinism.status == "unknown"
    assert [cell.weights for cell in report.grid] == ["checkpoint", "checkpoint"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_in_a_checkpoint_are_taken_off(prefix: str, tmp_path: Path):
    names = list(Gated().state_dict())
    wrapped = {f"{prefix}{name}": value for name, value in Gated().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "last.pt")

    assert list(read_checkpoint(tmp_path / "last.pt")) == names


def test_default_dtype_of_the_captured_process_is_used_and_put_back(tmp_path: Path):
    torch.set_default_dtype(torch.float64)
    try:
        path = train(tmp_path, Tiny(), [batch(), batch(bad=True)])
    finally:
        torch.set_default_dtype(torch.float32)

    report = nanhunt.replay(path, target=Tiny(), num_seeds=0)

    assert report.determinism.status == "bit-identical"
    assert reasons(report)["the whole step in float64"] == "weights are float64 already"
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_another_type_are_refused_rather_than_rounded(tmp_path: Path):
    class Half(Tiny):
        def build(self, seed: int) -> nn.Module:
            return Gated().to(torch.bfloat16)

        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return super().loss(model, {name: value.to(torch.bfloat16) for name, value in one.items()})

    path = train(tmp_path, Half(), [batch(bad=True)])

    with pytest.raises(nanhunt.TargetError, match=r"first.weight is torch.bfloat16 there, torch.float32 in the model"):
        nanhunt.replay(path, target=Tiny())


# What could not be done.


def test_first_step_has_no_control_batch(tmp_path: Path):
    report = nanhunt.replay(train(tmp_path, Tiny(), [batch(bad=True)]), target=Tiny(), num_seeds=1)

    assert [(cell.weights, cell.batch) for cell in report.grid] == [("captured", "bad"), ("fresh", "bad")]
    assert reasons(report) == {
        "the control batch": "none was captured, and the target makes none",
        "samples replaced one by one": "there is no control batch of the same size",
    }


def test_control_batch_that_the_target_fails_to_make_does_not_cost_the_finding(tmp_path: Path):
    class Failing(Tiny):
        def control_batch(self, seed: int) -> Any:
            raise KeyError("no data here")

    report = nanhunt.replay(train(tmp_path, Tiny(), [batch(bad=True)]), target=Failing(), num_seeds=0)

    assert report.first.code == "NH202"
    assert "gives no control batch: KeyError" in reasons(report)["the control batch"]


def test_control_batch_that_does_not_fit_does_not_cost_the_finding(capture: Path, tmp_path: Path):
    other = rewritten(capture, tmp_path / "other", lambda payload: payload.update(control=[{"rows": torch.ones(5, 7)}]))

    report = nanhunt.replay(other, target=Tiny(), num_seeds=1)

    assert report.first.code == "NH202"
    assert [(cell.weights, cell.batch) for cell in report.grid] == [("captured", "bad"), ("fresh", "bad")]
    assert "does not fit target" in reasons(report)["captured weights, control batch"]


@pytest.mark.parametrize(
    ("calls", "left"), [(1, "nothing"), (2, "the place"), (3, "the finding"), (6, "some experiments")]
)
def test_interruption_leaves_a_report_of_what_was_done(
    calls: int, left: str, capture: Path, monkeypatch: pytest.MonkeyPatch
):
    class Interrupted(Tiny):
        num_calls = 0

        def loss(self, model: nn.Module, one: Any) -> Tensor:
            # The first step also looks ahead, which is a call as well.
            self.num_calls += 1
            if self.num_calls == calls + (calls > 1):
                raise KeyboardInterrupt
            return super().loss(model, one)

    report = nanhunt.replay(capture, target=Interrupted(), num_seeds=0)

    assert reasons(report)["the rest of the replay"] == "interrupted"
    codes = {"nothing": []}.get(left, ["NH202"])
    assert [finding.code for finding in report.findings] == codes
    assert (report.baseline is None) == (left == "nothing")
    assert bool(report.chain) == (left != "nothing")
    assert bool(report.experiments) == (left == "some experiments")
    sentence = {
        "nothing": "the step was not run",
    }
    assert report.verdict.sentences[0].startswith(sentence.get(left, "root-gradient-at-zero"))


# The file that holds a batch only.


@pytest.mark.parametrize("label", [0.0, NAN])
def test_legacy_file_says_what_it_cannot_show(label: float, tmp_path: Path):
    class Legacy(Tiny):
        def loss(self, model: nn.Module, one: Any) -> Tensor:
            return (model(one["windows"], torch.ones(5))[:, 0] - one["labels"]).square().mean()

    path = tmp_path / "old.pt"
    torch.save({"windows": torch.randn(5, 3), "labels": torch.full((5,), label), "global_step": 19}, path)

    report = nanhunt.replay(path, target=Legacy(), num_seeds=2)

    assert report.determinism.status == "unknown"
    assert report.determinism.detail == "the file holds a batch only, nothing to compare with"
    assert report.verdict.sentences[-1].startswith("this file holds a batch only")
    assert reasons(report)["the failing step itself"].startswith("this file holds a batch only")
    assert {cell.weights for cell in report.grid} == {"fresh"}
    if math.isnan(label):
        assert [finding.code for finding in report.findings] == ["NH603"]
        assert report.verdict.certainty == "observed"
    else:
        assert report.findings == ()
        assert report.verdict.certainty == "unknown"
        assert report.verdict.sentences[0] == "on fresh weights the batch is finite with 2 of 2 seeds"
