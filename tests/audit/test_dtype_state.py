"""The audit changes nothing, and what it is given decides what it runs."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nanhunt
from nanhunt.audit.dtype import audit_subject
from nanhunt.audit.subject import Subject, find_subject
from nanhunt.capture.checkpoint import Stored
from nanhunt.errors import NanhuntError, TargetError
from nanhunt.reports.console import render
from nanhunt.targets import Target


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


class Tiny:
    """A target with a loss and a batch."""

    def build(self, seed):
        return model()

    def loss(self, built, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"first": F.mse_loss(built(batch["x"]), batch["y"]), "second": built(batch["x"]).float().mean()}

    def control_batch(self, seed):
        return {"x": torch.ones(16, 8) * torch.arange(16)[:, None], "y": torch.zeros(16, 2)}


def states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_weights_buffers_gradients_batch_and_random_numbers_are_as_before():
    net, batch = model(), torch.randn(16, 8, requires_grad=True)
    net(batch).sum().backward()
    kept = [*net.parameters(), *net.buffers()]
    copies, gradients = [tensor.detach().clone() for tensor in kept], [p.grad for p in net.parameters()]
    values = [gradient.clone() for gradient in gradients]
    before, seen = states(), batch.grad.clone()
    nanhunt.audit_dtype(net, batch, loss=lambda m, b: torch.nn.functional.dropout(m(b)).half().sum())
    assert states() == before
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, copies, strict=True))
    assert all(p.grad is gradient for p, gradient in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))
    assert torch.equal(batch.grad, seen)


def test_the_step_is_bit_for_bit_that_without_the_audit():
    seen = []

    def loss(net, batch):
        value = F.mse_loss(net(batch).half(), torch.zeros(16, 2, dtype=torch.float16))
        seen.append(value.item())
        return value

    net, batch = model(), torch.randn(16, 8)
    torch.manual_seed(5)
    nanhunt.audit_dtype(net, batch, loss=loss)
    loss(net, batch)
    assert seen[0] == seen[1]


def test_a_failing_step_puts_everything_back_as_well():
    net = model()
    copies = [tensor.clone() for tensor in net.buffers()]
    call = nn.Module.__call__

    def loss(built, batch):
        built(batch)
        raise RuntimeError("over")

    report = nanhunt.audit_dtype(net, torch.randn(16, 8), loss=loss)
    assert ("ended in", "RuntimeError: over") in report.facts
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(net.buffers(), copies, strict=True))
    assert nn.Module.__call__ is call
    assert not hasattr(torch.autocast.__enter__, "_nanhunt_stand_in")


def test_a_step_that_fails_before_it_begins_is_an_error():
    def loss(built, batch):
        raise RuntimeError("over")

    with pytest.raises(NanhuntError, match="the step fails before anything runs: RuntimeError: over"):
        nanhunt.audit_dtype(model(), torch.randn(16, 8), loss=loss)
    with pytest.raises(NanhuntError, match="the step fails before anything runs: TypeError"):
        nanhunt.audit_dtype(model(), (value for value in [torch.randn(16, 8)]))


def test_of_a_step_that_fails_later_it_is_not_said_that_nothing_is_wrong():
    def loss(built, batch):
        built(batch)
        raise RuntimeError("over")

    report = nanhunt.audit_dtype(model(), torch.randn(16, 8), loss=loss)
    assert report.absence == "the step ended in an error, and until then nothing was found"


def test_training_flags_are_as_before():
    net = model()
    net[2].eval()
    nanhunt.audit_dtype(net, torch.randn(16, 8), loss=lambda built, batch: built.eval()(batch).sum())
    assert [part.training for part in net] == [True, True, False, True]


class Writing(nn.Module):
    """Writes to a buffer, and replaces another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8))
        self.register_buffer("last", None)
        self.register_buffer("part", self.mask[:4])

    def forward(self, x):
        self.mask.mul_(2.0)
        self.last = x.detach()
        assert torch.equal(self.part, self.mask[:4])
        return self.layer(x) * self.mask


def test_a_pending_graph_of_the_callers_still_goes_backward():
    net = Writing()
    del net.part
    net.register_buffer("part", torch.full((4,), 2.0))
    mask = net.mask
    pending = (net.mask * net.layer.weight).sum()
    nanhunt.audit_dtype(net, torch.randn(16, 8))
    pending.backward()
    assert torch.equal(net.layer.weight.grad, torch.ones(8, 8))
    assert net.mask is mask
    assert net.last is None


def test_buffers_that_share_their_memory_go_on_sharing_it():
    net = Writing()
    assert "ended in" not in dict(nanhunt.audit_dtype(net, torch.randn(16, 8)).facts)
    assert torch.equal(net.mask, torch.ones(8))


def test_the_batch_may_be_written_to():
    batch = torch.ones(16, 8)
    nanhunt.audit_dtype(model(), batch, loss=lambda net, given: net(given.mul_(2)).sum())
    assert batch.sum() == 128


def test_a_target_is_built_and_its_batch_and_loss_are_used():
    report = nanhunt.audit_dtype(Tiny())
    facts = dict(report.facts)
    assert facts["loss"].endswith("in float32, of target Tiny")
    assert report.title == "dtype audit of Tiny"
    assert report.findings == ()
    titles = [table.title for table in report.tables]
    assert titles[:2] == ["where dtypes change, forward", "where dtypes change, backward"]


def test_a_subject_of_the_command_line_says_what_it_does():
    said = []
    report = audit_subject(find_subject(target=Tiny()), said.append)
    assert said
    assert len(report.passes) == 11


class Plain:
    """A target without a loss."""

    def build(self, seed):
        return model()


def test_a_capture_without_a_batch_is_run_on_its_calls_under_its_autocast():
    call = {"args": (torch.ones(16, 8),), "kwargs": {}, "output_grads": {"0": torch.ones(16, 2, dtype=torch.bfloat16)}}
    meta = {"autocast": {"device": "cpu", "dtype": "bfloat16"}, "model": {"training": {"2": False}}}
    capture = SimpleNamespace(payload={"calls": [call]}, meta=meta, batches=[])
    weights = {name: torch.ones_like(value) for name, value in model().state_dict().items()}
    stored = Stored(Path("bad_batch.pt"), weights=weights, capture=capture)
    report = audit_subject(Subject("bad_batch.pt", stored, Target("plain", Plain())), lambda what: None)
    facts = dict(report.facts)
    assert facts["autocast"] == "bfloat16 on cpu, as captured"
    assert facts["loss"] == "none: the captured gradients of the outputs"
    assert "in bfloat16" in facts["results"]
    assert "where dtypes change, backward" in [table.title for table in report.tables]
    assert (report.findings, report.skips) == ((), ())


def test_a_model_without_a_loss_goes_back_from_its_outputs():
    report = nanhunt.audit_dtype(model(), torch.ones(16, 8))
    assert dict(report.facts)["loss"] == "none given: that of the outputs, else their sum"
    assert "where dtypes change, forward" not in [table.title for table in report.tables]


@pytest.mark.parametrize("batch", [torch.ones(16, 8), (torch.ones(16, 8),), {"input": torch.ones(16, 8)}])
def test_a_batch_is_a_tensor_a_tuple_or_keywords(batch):
    report = nanhunt.audit_dtype(model(), batch)
    assert report.skips == ()


def test_without_a_batch_it_says_so():
    with pytest.raises(NanhuntError, match="no batch to run the model on"):
        nanhunt.audit_dtype(model())
    with pytest.raises(NanhuntError, match="no batch to run Bare on"):
        nanhunt.audit_dtype(type("Bare", (), {"build": lambda self, seed: model()})())


def test_a_loss_of_many_numbers_is_refused():
    with pytest.raises(TargetError, match="the loss is a Tensor, not a single number"):
        nanhunt.audit_dtype(model(), torch.ones(16, 8), loss=lambda net, batch: net(batch))


def test_a_failure_of_a_look_is_a_skip_and_never_reaches_the_step(monkeypatch):
    def broken(*args):
        raise OSError("no memory")

    monkeypatch.setattr("nanhunt.audit.dtype_probe.compared", broken)
    report = nanhunt.audit_dtype(model().half(), torch.ones(16, 8).half())
    assert [str(skip.reason) for skip in report.skips] == ["OSError: no memory"]
    assert "ended in" not in dict(report.facts)


def test_the_report_fits_a_terminal():
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    text = render(nanhunt.audit_dtype(net.half(), torch.ones(4, 8).half(), loss=lambda m, b: m(b).float().sum()))
    assert max(map(len, text.splitlines())) <= 80
    assert "how types are promoted" in text
