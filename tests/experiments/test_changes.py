"""Each kind of change is offered where it applies, and says why where it does not."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanhunt.capture.format import Capture
from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis, decay_groups, detach_offender, masks, precision, replaced_samples
from nanhunt.findings import Skip
from nanhunt.records.ops import OpRecord, SourceLine
from nanhunt.targets import Target


def diagnosis(batches: list[Any], control: list[Any], **more: Any) -> Diagnosis:
    offender = more.pop("offender", None)
    return Diagnosis(Capture({}, {"batches": batches, **more}), Target("tiny", object()), None, offender, control)


def backward(**more: Any) -> OpRecord:
    line = SourceLine("model.py", 3)
    return OpRecord(9, "aten::div", "birth", "backward", "", line, forward_op="aten::sqrt", **more)


def test_sample_is_replaced_in_every_tensor_of_the_batch_and_the_captured_one_is_kept():
    bad = {"rows": torch.zeros(3, 2), "labels": torch.zeros(3), "name": "x"}
    good = {"rows": torch.ones(4, 2), "labels": torch.ones(4), "name": "y"}

    offered = list(replaced_samples.changes(diagnosis([bad], [good])))
    [batch] = offered[1].batches([bad])

    assert [change.name for change in offered] == ["replace-sample-0", "replace-sample-1", "replace-sample-2"]
    assert batch["rows"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert (batch["labels"].tolist(), batch["name"]) == ([0, 1, 0], "x")
    assert not bool(bad["rows"].any())


@pytest.mark.parametrize(
    ("batches", "control", "reason"),
    [
        ([], [], "no batch is replayed, only the model's own inputs"),
        ([torch.zeros(3), torch.zeros(3)], [torch.ones(3)], "the step has several micro-batches"),
        ([{"a": torch.zeros(3), "b": torch.zeros(4)}], [], "the batch has no common first dimension"),
        ([torch.zeros(3)], [], "there is no control batch of the same size"),
        ([torch.zeros(3)], [torch.zeros(2)], "there is no control batch of the same size"),
    ],
)
def test_samples_that_cannot_be_replaced_are_a_skip_with_the_reason(batches: Any, control: Any, reason: str):
    assert list(replaced_samples.changes(diagnosis(batches, control))) == [Skip("samples replaced one by one", reason)]


def test_only_the_first_sixteen_samples_are_tried_and_the_rest_said():
    offered = list(replaced_samples.changes(diagnosis([torch.zeros(20)], [torch.ones(20)])))

    assert sum(isinstance(change, Change) for change in offered) == 16
    assert offered[-1] == Skip("samples 16 to 19 replaced", "only the first 16 are tried")


def test_flat_samples_are_also_replaced_together():
    signals = torch.arange(40.0).repeat(4, 2, 1)
    signals[1, 0] = signals[3] = 5.0

    offered = list(replaced_samples.changes(diagnosis([signals], [torch.ones(4, 2, 40)])))

    assert offered[0].title == "samples 1, 3 (with flat rows) replaced by a control sample"
    assert offered[2].title == "sample 1, with 1 flat rows, replaced by a control sample"


def test_offender_in_a_backward_of_the_users_own_is_not_detached():
    own = backward(own_backward=SourceLine("model.py", 9))

    assert [change.name for change in detach_offender.changes(diagnosis([], [], offender=backward()))] == [
        "detach-offender"
    ]
    assert list(detach_offender.changes(diagnosis([], [], offender=own))) == [
        Skip("no gradient through the offender", "it runs in a backward of the user's own, which stays in place")
    ]


def test_float64_is_not_tried_on_float64():
    assert list(precision.changes(diagnosis([], [], model={"weight": torch.zeros(2, dtype=torch.float64)}))) == [
        Skip("the whole step in float64", "weights are float64 already")
    ]


def test_output_without_a_tensor_is_said_rather_than_left_unclamped():
    @dataclass
    class Output:
        logits: Tensor

    class Wrapped(nn.Module):
        def forward(self, rows: Tensor) -> Output:
            return Output(rows)

    [clamp] = [change for change in masks.changes(diagnosis([], [])) if change.name == "clamp-outputs"]
    model = Wrapped()
    clamp.model(model)

    with pytest.raises(LookupError, match="no tensor was found in the model's output, a Output"):
        model(torch.full((2,), 100.0))


def test_decay_is_kept_off_names_with_norm_or_bias_and_state_is_kept():
    model = nn.Sequential()
    model.add_module("norm", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    adam = torch.optim.AdamW(model.parameters(), weight_decay=0.5)

    class Whole:
        def optimizer(self, _: nn.Module) -> torch.optim.Optimizer:
            return adam

    whole = Diagnosis(Capture({}, {}), Target("tiny", Whole()), None, None, [])
    [change] = decay_groups.changes(whole)

    assert change.optimizer(model, adam) is adam
    assert [(len(group["params"]), group["weight_decay"]) for group in adam.param_groups] == [(1, 0.5), (3, 0.0)]
    assert list(decay_groups.changes(diagnosis([], []))) == [
        Skip("weight-decay groups", "target tiny has no optimizer")
    ]
