"""What the audit of an optimizer refuses, what it skips, and healthy set-ups that look odd."""

import copy
import math

import pytest
import torch
from optimizer_models import Perceptron, batch_for, codes, finding, grouped, loss
from torch import nn
from torch.optim import lr_scheduler

import nanhunt
from nanhunt.audit.optimizer import audit_subject
from nanhunt.audit.optimizer_copies import NoCopy, guarded
from nanhunt.audit.subject import find_subject
from nanhunt.errors import CaptureError, NanhuntError, TargetError
from nanhunt.findings import Skip


def audit(model, optimizer, **options):
    return nanhunt.audit_optimizer(model, optimizer, **options)


def reasons(report, part):
    return [skip.reason for skip in report.skips if part in skip.what]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


# A loss of another model


def test_a_loss_of_the_original_model_is_refused_and_leaves_nothing_in_it():
    model, batch = Normed(), batch_for(Perceptron())
    loss(model, batch).backward()
    gradients = [(one.grad, one.grad.clone(), one.grad._version) for one in model.parameters()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(NanhuntError, match="does not use the model it is given"):
        audit(model, optimizer, batch=batch, loss=lambda given, batch: loss(model, batch))

    for parameter, (gradient, value, version) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
        assert gradient._version == version
    assert all(torch.equal(one, buffers[name]) for name, one in model.named_buffers())


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": "10"}, "num_steps is '10'"),
        ({"warmup_steps": -5}, "warmup_steps is -5"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan"),
    ],
)
def test_numbers_that_nobody_can_mean_are_refused(options, message):
    model = Perceptron()
    with pytest.raises(NanhuntError, match=message):
        audit(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_no_optimizer_and_one_without_groups_are_refused():
    model = Perceptron()
    with pytest.raises(NanhuntError, match="the optimizer is a NoneType"):
        audit(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups.clear()
    with pytest.raises(NanhuntError, match="no parameter groups"):
        audit(model, optimizer)


class Target:
    def build(self, seed):
        return Perceptron()

    def optimizer(self, model):
        return torch.optim.AdamW(grouped(model), lr=1e-3)


class NoScheduler(Target):
    def scheduler(self, optimizer):
        raise RuntimeError("no rates today")


class NoOptimizer(Target):
    def optimizer(self, model):
        return None


class TextSteps(Target):
    num_steps = "1000"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (NoScheduler(), "gives no scheduler: RuntimeError: no rates today"),
        (NoOptimizer(), "gives a NoneType, not a torch optimizer"),
        (TextSteps(), "target TextSteps: num_steps is '1000'"),
    ],
)
def test_a_target_that_cannot_be_used_ends_in_one_line(target, message):
    with pytest.raises(NanhuntError, match=message) as caught:
        audit_subject(find_subject(None, target), lambda what: None)
    assert isinstance(caught.value, TargetError) or target.__class__ is TextSteps


@pytest.mark.parametrize("given", [None, Target()], ids=["alone", "with its target"])
def test_a_file_whose_groups_are_none_is_refused_and_one_without_a_rate_is_read(tmp_path, given):
    model = Perceptron()
    optimizer = Target().optimizer(model)
    path = tmp_path / "last.pt"
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = None
    torch.save({"model": model.state_dict(), "optimizer": state}, path)
    assert codes(audit_subject(find_subject(path, given), lambda what: None)) == []
    torch.save({"model": model.state_dict(), "optimizer": {**state, "param_groups": 5}}, path)
    with pytest.raises(CaptureError, match="are not a list of groups"):
        audit_subject(find_subject(path, given), lambda what: None)


# What is skipped


def test_what_fails_in_one_part_is_a_skip():
    skips: list[Skip] = []
    with guarded("one part", skips):
        raise NotImplementedError("long " * 100)
    with guarded("another", skips):
        raise NoCopy("no copy of it")
    assert [skip.what for skip in skips] == ["one part", "another"]
    assert skips[0].reason.startswith("NotImplementedError: long")
    assert len(skips[0].reason) == 200
    assert skips[1].reason == "no copy of it"


def test_sparse_gradients_are_a_skip():
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"x": torch.randint(0, 20, (4, 2)), "y": torch.tensor([0, 1, 2, 0])}
    report = audit(model, optimizer, batch=batch, loss=loss, max_grad_norm=1.0)
    assert codes(report) == []
    assert reasons(report, "sparse") == ["1 gradient is sparse"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.LazyLinear(3), "they are lazy"),
        (lambda: nn.Linear(6, 3, device="meta"), "they are on the meta device"),
    ],
)
def test_parameters_without_values_are_a_skip(make, kind):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    report = audit(model, optimizer, scheduler=lr_scheduler.CosineAnnealingLR(optimizer, 10))
    assert codes(report) == []
    assert reasons(report, "a step on copies of 2 parameters") == [kind]


class OwnRate(torch.optim.Optimizer):
    """Finds its rate by itself, as Adafactor with ``relative_step``."""

    def __init__(self, params, lr=None):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            parameter.sub_(parameter.grad.sign(), alpha=1e-3)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_an_optimizer_that_finds_its_rate_by_itself_is_stepped_and_not_found(rate):
    model = Perceptron()
    report = audit(model, OwnRate(model.parameters(), rate), batch=batch_for(model), loss=loss)
    assert codes(report) == []
    assert reasons(report, "NH347") == [
        "the schedule cannot be asked for it, or the optimizer finds its rate by itself"
    ]


# Several optimizers


def test_what_other_optimizers_hold_is_not_missing():
    model = Perceptron()
    first, second = model.seq.parameters(), [model.dbnet.weight]
    one, other = torch.optim.Adam(first), torch.optim.SGD(second, lr=0.1)
    found = finding(audit(model, one, others=[other]), "NH323")
    assert found.message == "1 trainable parameter is in none of the 2 optimizers that were given"
    assert found.location.tensor == "dbnet.bias"
    other.add_param_group({"params": [model.dbnet.bias]})
    assert codes(audit(model, one, others=[other])) == []


# Healthy set-ups that look odd


def test_a_small_group_of_sgd_that_moves_far_is_no_large_step():
    torch.manual_seed(0)
    model = Perceptron()
    nn.init.normal_(model.dbnet.weight, std=1e-3)
    nn.init.zeros_(model.dbnet.bias)
    groups = [{"params": model.dbnet.parameters(), "lr": 0.1}, {"params": model.seq.parameters()}]
    report = audit(model, torch.optim.SGD(groups, lr=0.01), batch=batch_for(model), loss=loss)
    assert codes(report) == []
    assert "NH339" in report.passes


class Sum(torch.optim.Optimizer):
    """Keeps the sum of signed gradients."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            total = self.state[parameter].setdefault("sum", torch.zeros_like(parameter))
            parameter.sub_(total.add_(parameter.grad), alpha=1e-3)


def test_a_signed_state_called_sum_is_no_second_moment_and_that_of_adagrad_is():
    model = Perceptron()
    for kind, expected in ((Sum, []), (torch.optim.Adagrad, ["NH341"])):
        optimizer = kind(model.parameters())
        loss(model, batch_for(model)).backward()
        optimizer.step()
        optimizer.state[model.dbnet.weight]["sum"].fill_(-1.0)
        assert codes(audit(model, optimizer)) == expected


def test_a_part_that_was_not_used_so_far_is_said_to_look_like_lost_state():
    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
    optimizer = torch.optim.Adam(model.parameters())
    batch = batch_for(Perceptron())
    loss(model["a"], batch).backward()
    optimizer.step()
    both = audit(model, optimizer, batch=batch, loss=lambda m, batch: loss(lambda x: m["a"](x) + m["b"](x), batch))
    found = finding(both, "NH343")
    assert (found.evidence["num_without"], found.evidence["num_parameters"]) == (2, 4)
    assert "look the same" in found.notes[1]


def test_a_frozen_parameter_with_a_stored_gradient_is_named_with_a_batch_as_well():
    model = Perceptron()
    batch = batch_for(model)
    loss(model, batch).backward()
    model.dbnet.bias.requires_grad_(False)
    report = audit(model, torch.optim.SGD(model.parameters(), lr=0.1), batch=batch, loss=loss)
    assert finding(report, "NH326").evidence["num_with_gradient"] == 1


# What is said of decay


class Broken(torch.optim.AdamW):
    def step(self, closure=None):
        raise ValueError("no step")


def test_decay_that_could_not_be_tried_is_said_to_be_unknown():
    model = Perceptron()
    notes = finding(audit(model, Broken(model.parameters())), "NH320").notes
    assert notes == ("how Broken applies its decay is not known: no step on copies could tell",)


def test_decay_that_diverges_is_not_called_hygiene():
    model = Perceptron()
    report = audit(model, torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=3.0), num_steps=100)
    assert codes(report) == ["NH328", "NH320"]
    assert finding(report, "NH320").notes == ("rate x weight decay is 3: diverging-weight-decay says what that does",)


# Steps on a few numbers


def test_the_largest_bad_gradient_is_the_largest_one():
    model = Perceptron().half()
    value = finding(audit(model, torch.optim.Adam(model.parameters())), "NH329").evidence["largest_bad_gradient"]

    def is_bad(gradient):
        weight = nn.Parameter(torch.ones(2).half())
        weight.grad = torch.full((2,), gradient).half()
        torch.optim.Adam([weight]).step()
        return not bool(weight.isfinite().all())

    assert is_bad(value)
    assert not any(is_bad(value * (1 + 0.01 * more)) for more in range(1, 60))


@pytest.mark.parametrize(("eps", "expected"), [(1e-30, ["NH349"]), (1e-8, [])])
def test_an_eps_that_lets_a_small_gradient_throw_a_weight_is_found(eps, expected):
    model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-22)
    report = audit(model, optimizer)
    assert [code for code in codes(report) if code != "NH330"] == expected
    if expected:
        assert finding(report, "NH349").evidence["largest_change"] == pytest.approx(1e5, rel=1e-3)
