"""``audit_optimizer``: what it finds in groups and steps, that healthy set-ups pass, and that it changes nothing."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from optimizer_models import (
    INPUTS,
    Attention,
    Perceptron,
    Recurrent,
    Residual,
    StateSpace,
    batch_for,
    codes,
    finding,
    grouped,
    loss,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import nanhunt
from nanhunt.errors import NanhuntError
from nanhunt.reports.console import render

KINDS = list(INPUTS)


def audit(model, optimizer, **options):
    return nanhunt.audit_optimizer(model, optimizer, **options)


# Healthy set-ups


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_grouped_adamw_gives_no_finding(kind):
    model = kind()
    optimizer = torch.optim.AdamW(grouped(model), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    report = audit(
        *(model, optimizer),
        scheduler=scheduler,
        batch=batch_for(model),
        loss=loss,
        max_grad_norm=1.0,
        num_steps=1000,
        warmup_steps=50,
    )
    assert codes(report) == []
    assert report.absence == "nothing was found"


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=1e-3),
        lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, lr=1e-3),
        lambda params: torch.optim.Adagrad(params, lr=1e-2),
        lambda params: torch.optim.Adafactor(params, lr=1e-2),
        lambda params: torch.optim.NAdam(params, lr=1e-3, foreach=True),
        lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3), weight_decay=0.0, fused=True),
        lambda params: torch.optim.Rprop(params, lr=1e-3),
    ],
)
def test_other_optimizers_give_no_finding(make):
    model = Perceptron()
    report = audit(model, make(model.parameters()), batch=batch_for(model), loss=loss)
    assert codes(report) == []
    assert not [skip for skip in report.skips if "step" in skip.what]


def test_a_pair_of_muon_and_adamw_over_parts_of_a_model_says_what_the_other_must_hold():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = audit(model, torch.optim.Muon([one.weight for one in model], lr=1e-3))
    assert codes(report) == ["NH323"]


def test_an_optimizer_that_wants_a_closure_is_skipped_with_the_reason():
    model = Perceptron()
    report = audit(model, torch.optim.LBFGS(model.parameters()))
    assert codes(report) == []
    assert any("closure" in skip.reason for skip in report.skips)


# Weight decay


def test_decayed_norms_and_biases_are_told_by_type_not_by_name():
    model = Perceptron()
    report = audit(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), num_steps=100)
    found = finding(report, "NH320")
    assert codes(report) == ["NH320"]
    assert found.message == "weight decay of 0.1 acts on 2 biases, 1 norm bias, 1 norm gain"
    assert found.evidence["first"] == "seq.0.bias, seq.1.weight, seq.1.bias and 1 more"
    assert found.severity == "warning"


def test_the_shrinkage_is_what_adamw_does_to_a_weight_without_gradient():
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    notes = finding(audit(model, optimizer, num_steps=1000), "NH320").notes
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    oracle = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        oracle.step()
    assert notes[0] == f"where the gradient is 0, {weight.item():.4g} of the value is left after 1,000 steps (planned)"
    assert notes[0].startswith("where the gradient is 0, 0.9048 ")
    assert notes[1] == "this is hygiene: it cannot by itself make a value NaN or infinite"


def test_decay_in_the_gradient_of_adam_is_not_given_a_factor():
    model = Perceptron()
    report = audit(model, torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1))
    assert finding(report, "NH320").notes[0].startswith("Adam adds the decay to the gradient")
    decoupled = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)
    assert "of the value is left" in finding(audit(model, decoupled), "NH320").notes[0]


def test_a_decayed_embedding_is_found_and_a_tied_one_is_a_linear_map():
    model = Attention()
    groups = grouped(model)
    groups[0]["params"].append(model.tokens.weight)
    groups[1]["params"] = [one for one in groups[1]["params"] if one is not model.tokens.weight]
    assert codes(audit(model, torch.optim.AdamW(groups))) == ["NH321"]
    tied = nn.ModuleDict({"tokens": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    tied["head"].weight = tied["tokens"].weight
    assert codes(audit(tied, torch.optim.AdamW(tied.parameters()))) == []


def test_a_mark_that_asks_for_no_decay_is_read():
    model = StateSpace()
    report = audit(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert codes(report) == ["NH320", "NH322"]
    assert finding(report, "NH322").location.tensor == "A_log"
    assert "A_log" not in str(finding(report, "NH320").evidence)


def test_a_norm_of_a_foreign_class_is_told_by_what_it_does():
    model = Residual()
    report = audit(model, torch.optim.AdamW(model.parameters()))
    assert finding(report, "NH320").message == "weight decay of 0.01 acts on 1 other vector, 2 biases, 1 norm gain"
    assert "place" not in str(finding(report, "NH320").evidence)


def test_norms_of_every_class_of_torch_are_norms():
    kinds = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm([2, 3, 4])]
    model = nn.ModuleList([*kinds, nn.RMSNorm(4)])
    report = audit(model, torch.optim.AdamW(model.parameters()))
    assert finding(report, "NH320").message == "weight decay of 0.01 acts on 4 norm biases, 5 norm gains"


def test_biases_of_recurrent_and_attention_layers_are_biases():
    model = nn.ModuleList([nn.LSTM(4, 8), nn.MultiheadAttention(8, 2, add_bias_kv=True)])
    report = audit(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert finding(report, "NH320").message == "weight decay of 0.1 acts on 6 biases"


@pytest.mark.parametrize(("rate", "decay", "severity"), [(0.1, 30.0, "error"), (1.0, 1.5, "warning")])
def test_decay_that_diverges_is_found(rate, decay, severity):
    model = nn.Linear(2, 2, bias=False)
    report = audit(model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay))
    assert codes(report) == ["NH328"]
    assert finding(report, "NH328").severity == severity
    assert "rate x weight decay is" in finding(report, "NH328").message


# What is in the groups


def test_a_trainable_parameter_in_no_group_is_found_unless_it_gets_no_gradient():
    model = Perceptron()
    optimizer = torch.optim.Adam(model.seq.parameters())
    found = finding(audit(model, optimizer), "NH323")
    assert found.message == "2 trainable parameters are in no group of the optimizer that was given"
    model.unused = nn.Linear(2, 2)
    optimizer = torch.optim.Adam([*model.seq.parameters(), *model.dbnet.parameters()])
    assert codes(audit(model, optimizer)) == ["NH323"]
    assert codes(audit(model, optimizer, batch=batch_for(model), loss=loss)) == []


def test_a_parameter_held_twice_is_found():
    model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["params"].append(model.dbnet.weight)
    assert codes(audit(model, optimizer)) == ["NH324"]
    assert finding(audit(model, optimizer), "NH324").location.tensor == "dbnet.weight"


def test_the_optimizer_of_another_model_is_found():
    model = Perceptron()
    assert codes(audit(model, torch.optim.Adam(Perceptron().parameters()))) == ["NH325"]


def test_float32_copies_of_half_precision_weights_are_a_skip():
    model = Perceptron().to(torch.bfloat16)
    masters = [nn.Parameter(one.detach().float()) for one in model.parameters()]
    report = audit(model, torch.optim.Adam(masters))
    assert codes(report) == []
    assert any("master copies" in skip.reason for skip in report.skips)


def test_frozen_parameters_in_the_groups_are_found_and_those_that_still_move_named():
    model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    model.dbnet.requires_grad_(False)
    assert finding(audit(model, optimizer), "NH326").evidence["num_with_gradient"] == 0
    model.dbnet.bias.grad = torch.ones(3)
    assert finding(audit(model, optimizer), "NH326").evidence["num_with_gradient"] == 1


def test_a_rate_that_is_nan_is_found():
    model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["lr"] = math.nan
    found = codes(audit(model, optimizer))
    assert "NH327" in found
    assert "NH329" not in found


# Steps on copies


def test_eps_that_float16_cannot_hold_is_found_and_fused_is_fine():
    model = Perceptron().half()
    assert "NH329" in codes(audit(model, torch.optim.Adam(model.parameters())))
    fused = audit(model, torch.optim.Adam(model.parameters(), fused=True))
    assert not {"NH329", "NH331"} & set(codes(fused))
    assert codes(audit(Perceptron().float(), torch.optim.Adam(model.parameters()))) != []


def test_bfloat16_weights_that_do_not_move_are_found():
    model = Perceptron().to(torch.bfloat16)
    found = finding(audit(model, torch.optim.Adam(model.parameters(), lr=1e-3)), "NH330")
    assert "no element moves in 1 parameter: seq.1.weight" in found.notes
    assert codes(audit(Perceptron(), torch.optim.Adam(model.parameters(), lr=1e-3))) != []


def test_sgd_is_judged_with_real_gradients_only():
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    without = audit(model, optimizer)
    assert codes(without) == []
    assert any("give a batch and a loss" in skip.reason for skip in without.skips)
    assert codes(audit(model, optimizer, batch=batch_for(model), loss=loss)) == ["NH330"]


def test_a_step_that_overflows_float16_is_found():
    model = nn.Linear(2, 2, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    model.weight.grad = torch.full((2, 2), 60000.0, dtype=torch.float16)
    found = finding(audit(model, optimizer), "NH331")
    assert found.message == "one step makes 4 weights non-finite, from finite weights and gradients"


# It changes nothing


def everything(model, optimizer, scheduler):
    return {
        "model": {name: (one.clone(), one._version) for name, one in model.state_dict(keep_vars=True).items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        "hooks": [len(one._forward_hooks) for one in model.modules()],
        "rng": (torch.get_rng_state(), random.getstate(), tuple(np.random.get_state()[1])),  # noqa: NPY002
        "training": [one.training for one in model.modules()],
        "step": optimizer.__dict__.get("step"),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def trained(kind=Attention):
    model = kind()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=50)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch_for(model)).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def broken(model, batch):
    torch.rand(3)
    loss(model, batch).backward()
    raise ValueError("no such loss")


@pytest.mark.parametrize("of_batch", [loss, broken], ids=["works", "fails"])
def test_nothing_changes_also_when_a_step_fails(of_batch):
    model, optimizer, scheduler = trained()
    calls = []
    model.register_forward_hook(lambda *args: calls.append("module"))
    optimizer.register_step_pre_hook(lambda *args: calls.append("optimizer"))
    handle = register_optimizer_step_post_hook(lambda *args: calls.append("global"))
    before = everything(model, optimizer, scheduler)
    batch = batch_for(model)
    before["rng"] = everything(model, optimizer, scheduler)["rng"]
    report = audit(model, optimizer, scheduler=scheduler, batch=batch, loss=of_batch, max_grad_norm=0.1)
    handle.remove()
    assert same(before, everything(model, optimizer, scheduler))
    assert calls == []
    assert any("no such loss" in skip.reason for skip in report.skips) == (of_batch is broken)


def test_training_goes_on_as_if_nothing_had_looked():
    ends = []
    for looks in (False, True):
        torch.manual_seed(1)
        model, optimizer, scheduler = trained(Recurrent)
        if looks:
            audit(model, optimizer, scheduler=scheduler, batch=batch_for(model), loss=loss)
            torch.manual_seed(2)
        torch.manual_seed(2)
        loss(model, batch_for(model)).backward()
        optimizer.step()
        scheduler.step()
        ends.append(torch.cat([one.flatten() for one in model.parameters()]).detach())
    assert torch.equal(*ends)


def test_a_wrapped_model_is_seen_through():
    model = Perceptron()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = audit(wrapped, torch.optim.AdamW(wrapped.parameters()), batch=batch_for(model), loss=loss)
    assert "seq.1.weight" in str(finding(report, "NH320").evidence["first"])
    assert "loss of the batch" in dict(report.facts)


def test_a_batch_without_a_loss_is_refused():
    model = Perceptron()
    with pytest.raises(NanhuntError, match="a batch needs a loss"):
        audit(model, torch.optim.Adam(model.parameters()), batch=batch_for(model))


def test_the_report_fits_80_columns():
    model, optimizer, scheduler = trained()
    text = render(audit(model, optimizer, scheduler=scheduler, batch=batch_for(model), loss=loss, max_grad_norm=0.1))
    assert max(map(len, text.splitlines())) <= 80
    assert "learning rate" in text
    assert "one infinite gradient becomes NaN" in text


@pytest.mark.parametrize(
    ("gain", "max_grad_norm", "is_found"), [(1e3, None, True), (1e3, 1.0, False), (1e-2, None, False)]
)
def test_a_step_larger_than_the_weights_asks_for_clipping(gain, max_grad_norm, is_found):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    x = torch.randn(8, 4)
    gradient = torch.autograd.grad((model(x) * gain).square().mean(), model.weight)[0]
    moved_by = 0.1 * float(gradient.norm()) / float(model.weight.detach().norm())

    report = nanhunt.audit_optimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        batch=x,
        loss=lambda model, x: (model(x) * gain).square().mean(),
        max_grad_norm=max_grad_norm,
    )

    found = [finding for finding in report.findings if finding.code == "NH339"]
    assert bool(found) == is_found
    if found:
        assert found[0].evidence["moved_by"] == pytest.approx(moved_by, rel=1e-5)
