"""The optimizer's state: as it stands, in checkpoints, and against a target."""

import math

import pytest
import torch
from optimizer_models import Perceptron, batch_for, codes, finding, grouped, loss
from typer.testing import CliRunner

import nanhunt
from nanhunt.audit.optimizer import audit_subject
from nanhunt.audit.subject import find_subject
from nanhunt.cli.app import app
from nanhunt.errors import NanhuntError


class Target:
    """Builds the perceptron; its optimizer has groups as they should be."""

    eps = 1e-8
    max_grad_norm = None

    def build(self, seed):
        torch.manual_seed(seed)
        return Perceptron()

    def optimizer(self, model):
        return torch.optim.AdamW(grouped(model), lr=1e-3, eps=self.eps)

    def loss(self, model, batch):
        return loss(model, batch)

    def control_batch(self, seed):
        return batch_for(Perceptron())


target = Target()


def trained(num_steps=3):
    model = Perceptron()
    optimizer = target.optimizer(model)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model, batch_for(model)).backward()
        optimizer.step()
    return model, optimizer


def audit_of(path, given=None):
    return audit_subject(find_subject(path, given), lambda what: None)


def saved(tmp_path, form="plain", spoil=None, num_steps=3, step=3):
    model, optimizer = trained(num_steps)
    state = optimizer.state_dict()
    if spoil is not None:
        spoil(state)
    content = {
        "plain": {"model_state_dict": model.state_dict(), "optimizer_state_dict": state, "step": step},
        "lightning": {"state_dict": model.state_dict(), "optimizer_states": [state], "global_step": step},
        "wrapped": {"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "optimizer": state},
        "optimizer": state,
        "weights": model.state_dict(),
    }[form]
    path = tmp_path / "last.pt"
    torch.save(content, path)
    return path


def entry(state, number=0):
    return state["state"][number]


@pytest.mark.parametrize("form", ["plain", "lightning", "wrapped", "optimizer", "weights"])
@pytest.mark.parametrize("given", [None, target], ids=["alone", "with its target"])
def test_healthy_checkpoints_of_every_form_give_no_finding(tmp_path, form, given):
    report = audit_of(saved(tmp_path, form), given)
    assert codes(report) == []
    assert any("holds no optimizer" in skip.reason for skip in report.skips) == (form == "weights")


@pytest.mark.parametrize("given", [None, target], ids=["alone", "with its target"])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda state: entry(state)["exp_avg"].fill_(math.nan), "NH340"),
        (lambda state: entry(state)["exp_avg_sq"][0].fill_(math.inf), "NH340"),
        (lambda state: entry(state)["exp_avg_sq"][0].fill_(-1.0), "NH341"),
        (lambda state: state["state"].update({99: {"exp_avg": torch.zeros(2)}}), "NH344"),
        (lambda state: state["param_groups"][0].update(lr=math.nan), "NH327"),
    ],
    ids=["NaN", "infinite", "negative", "unknown", "rate"],
)
def test_poisoned_state_is_found_with_and_without_a_target(tmp_path, spoil, code, given):
    assert codes(audit_of(saved(tmp_path, spoil=spoil), given)) == [code]


def test_a_poisoned_moment_is_named_and_no_step_starts_from_it(tmp_path):
    path = saved(tmp_path, spoil=lambda state: entry(state)["exp_avg_sq"][0].fill_(math.inf))
    report = audit_of(path, target)
    found = finding(report, "NH340")
    assert found.message == "exp_avg_sq of seq.0.weight in the file holds 6 infinite of 48 elements"
    assert found.notes == ("these weights never move again",)
    assert found.evidence["first_index"] == [0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(6, 8), "exp_avg of seq.0.weight in the file has shape (6, 8), the weight (8, 6)"),
        (torch.zeros(8, 6, dtype=torch.float16), "exp_avg of seq.0.weight in the file is float16, the weight float32"),
    ],
)
def test_state_of_another_shape_or_type_is_found(tmp_path, value, message):
    report = audit_of(saved(tmp_path, spoil=lambda state: entry(state).update(exp_avg=value)), target)
    assert finding(report, "NH342").message == message


def test_state_of_another_number_of_parameters_is_found(tmp_path):
    def spoil(state):
        state["param_groups"][1]["params"].pop()
        del state["state"][5]

    report = audit_of(saved(tmp_path, spoil=spoil), target)
    assert finding(report, "NH342").message == "the state is of 5 parameters, the target's optimizer has 6"
    assert any("starts from the stored state" in skip.what for skip in report.skips)


def test_weights_restored_without_the_state_are_found(tmp_path):
    path = saved(tmp_path, num_steps=0, step=1000)
    assert codes(audit_of(path)) == ["NH343"]
    assert codes(audit_of(path, target)) == ["NH343"]
    assert codes(audit_of(saved(tmp_path, num_steps=0, step=0), target)) == []


def test_settings_that_loading_would_replace_are_found(tmp_path):
    other = Target()
    other.eps = 1e-6
    found = finding(audit_of(saved(tmp_path), other), "NH345")
    assert found.message == "eps of group 0 is 1e-08 in the file and 1e-06 in the target"


def test_non_finite_weights_in_a_file_are_found(tmp_path):
    path = saved(tmp_path, "weights")
    weights = torch.load(path)
    weights["dbnet.bias"][0] = math.nan
    torch.save(weights, path)
    assert codes(audit_of(path)) == ["NH346"]


def test_the_state_as_it_stands_is_judged():
    model, optimizer = trained()
    assert codes(nanhunt.audit_optimizer(model, optimizer)) == []
    optimizer.state[model.dbnet.weight]["exp_avg_sq"][0, 0] = -1.0
    found = finding(nanhunt.audit_optimizer(model, optimizer), "NH341")
    assert found.message == "exp_avg_sq of dbnet.weight in the optimizer is negative in 1 of 24 elements"
    del optimizer.state[model.dbnet.weight]
    report = nanhunt.audit_optimizer(model, optimizer, batch=batch_for(model), loss=loss)
    assert finding(report, "NH343").location.tensor == "dbnet.weight"


def test_a_file_with_neither_weights_nor_optimizer_is_refused(tmp_path):
    capture = tmp_path / "batch.pt"
    torch.save({"windows": torch.zeros(1, 2), "labels": torch.zeros(1), "global_step": 3}, capture)
    subject = find_subject(capture, target)
    assert codes(audit_subject(subject, lambda what: None)) == []
    with pytest.raises(NanhuntError, match="neither weights nor an optimizer"):
        audit_subject(type(subject)(subject.name, subject.stored, None), lambda what: None)


def test_the_command_gives_the_report_and_the_exit_code(tmp_path):
    runner = CliRunner()
    healthy = runner.invoke(app, ["audit-optimizer", str(saved(tmp_path))])
    assert healthy.exit_code == 0, healthy.output
    path = saved(tmp_path, spoil=lambda state: entry(state)["exp_avg"].fill_(math.nan))
    poisoned = runner.invoke(app, ["audit-optimizer", str(path), "--target", "test_optimizer_state:target"])
    assert poisoned.exit_code == 1
    assert "error[NH340]" in poisoned.output
