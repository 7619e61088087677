"""The schedule's real curve, and clipping."""

import math

import pytest
import torch
from optimizer_models import Perceptron, batch_for, codes, finding, loss
from torch import nn
from torch.optim import lr_scheduler

import nanhunt
from nanhunt.audit.optimizer_schedule import curve_of


def sgd(rate=0.1):
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=rate)


def adam(rate=1e-3):
    model = Perceptron()
    return model, torch.optim.Adam(model.parameters(), lr=rate)


def warmup(optimizer, steps):
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


SCHEDULES = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 7),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [5, 20]),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 8),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 25, 2.0),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=30),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.95),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, 25)],
        milestones=[5],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_curve_is_what_a_loop_would_run_at(kind):
    optimizer = sgd()
    scheduler = SCHEDULES[kind](optimizer)
    curve = curve_of(scheduler, optimizer, 30)
    taken = []
    for _ in range(30):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rate for _, rate in curve.of(0)] == pytest.approx(taken, rel=1e-6, abs=1e-12)


def test_a_long_warm_up_and_cosine_is_sampled_at_its_peak_and_its_end_is_found():
    optimizer = sgd(5e-5)

    def factor(step):
        if step < 154_040:
            return (step + 1) / 154_040
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 154_040) / (1_540_400 - 154_040))))

    curve = curve_of(lr_scheduler.LambdaLR(optimizer, factor), optimizer, None)
    assert (curve.num_steps, curve.steps_from) == (1_540_400, "where the schedule reaches 0")
    assert curve.peak(0) == 5e-5
    assert max(curve.of(0), key=lambda point: point[1])[0] in (154_039, 154_040)
    assert len(curve.steps) < 2500
    # Half of the peak on average over the warm-up, and over the cosine.
    assert curve.kept_share(0, 0.05) == pytest.approx(math.exp(-0.05 * 5e-5 * 1_540_400 / 2), rel=1e-4)


def test_a_schedule_that_raises_beyond_its_end_says_where():
    model, optimizer = adam()
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=100)
    (skip,) = (one for one in report.skips if one.what == "the rest of the schedule")
    assert skip.reason.startswith("it raises at its step 21 of 100: Tried to step 21 times")


def test_a_schedule_that_follows_a_metric_is_a_skip():
    model, optimizer = adam()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler)
    assert any("follows a metric" in skip.reason for skip in report.skips)


def test_the_first_update_before_the_warm_up_is_found():
    model, optimizer = adam()
    scheduler = warmup(optimizer, 100)
    optimizer.param_groups[0]["lr"] = 1e-3
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=1000)
    assert codes(report) == ["NH332"]
    assert finding(report, "NH332").message == "the first update runs at 0.001, 1 of the highest rate"


def test_a_said_warm_up_that_is_not_there_is_found():
    model, optimizer = adam()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, warmup_steps=50)
    assert codes(report) == ["NH332"]


@pytest.mark.parametrize(("real", "said", "expected"), [(50, 50, []), (500, 50, ["NH333"]), (5, 50, ["NH333"])])
def test_a_warm_up_of_another_length_than_said_is_found(real, said, expected):
    model, optimizer = adam()
    report = nanhunt.audit_optimizer(
        model, optimizer, scheduler=warmup(optimizer, real), num_steps=1000, warmup_steps=said
    )
    assert codes(report) == expected


def test_a_run_that_ends_in_the_warm_up_is_found():
    model, optimizer = adam(5e-5)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=warmup(optimizer, 154_040), num_steps=300)
    assert codes(report) == ["NH335"]
    assert finding(report, "NH335").message == "after 300 steps the rate is 9.74e-08 and still rising to 5e-05"
    unplanned = nanhunt.audit_optimizer(model, optimizer, scheduler=warmup(optimizer, 154_040))
    assert codes(unplanned) == []


def test_rates_that_move_no_weight_are_counted():
    model, optimizer = adam()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 100 else 1e-8)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=1000)
    assert finding(report, "NH334").evidence["num_idle"] == 900


def test_a_schedule_of_another_optimizer_is_found():
    model, optimizer = adam()
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=warmup(adam()[1], 10))
    assert codes(report) == ["NH336"]


# Schedules under way, of some groups, and of no rate


def warmup_then_cosine(optimizer, steps=300, total=3000):
    parts = [
        lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, steps),
        lr_scheduler.CosineAnnealingLR(optimizer, total - steps),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [steps])


@pytest.mark.parametrize(("taken", "said", "expected"), [(200, 300, []), (200, 100, ["NH333"]), (500, 300, [])])
def test_a_schedule_under_way_is_judged_from_where_it_stands(taken, said, expected):
    model, optimizer = adam()
    scheduler = warmup_then_cosine(optimizer)
    for _ in range(taken):
        optimizer.step()
        scheduler.step()
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=3000, warmup_steps=said)
    assert codes(report) == expected
    assert any("under way at step" in skip.reason for skip in report.skips)
    (curve,) = (table for table in report.tables if table.title == "learning rate")
    assert curve.note == f"3,000 steps (planned, from step {taken} on)"
    if expected:
        assert finding(report, "NH333").evidence["measured"] == 300


def two_groups(first, second):
    model = Perceptron()
    groups = [{"params": model.seq.parameters()}, {"params": model.dbnet.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    return model, optimizer, lr_scheduler.LambdaLR(optimizer, [first, second])


def rising(step):
    return min(1.0, (step + 1) / 200)


def test_every_group_is_judged_whose_curve_has_another_shape():
    model, optimizer, scheduler = two_groups(rising, lambda step: 1.0)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=5000, warmup_steps=200)
    assert codes(report) == ["NH332"]
    assert finding(report, "NH332").message.startswith("the first update in group 1 runs at 0.001")
    model, optimizer, scheduler = two_groups(rising, lambda step: 0.1 * rising(step))
    assert codes(nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=5000, warmup_steps=200)) == []


def test_a_group_that_was_added_after_the_schedule_is_found():
    model = Perceptron()
    optimizer = torch.optim.Adam(model.seq.parameters())
    scheduler = warmup(optimizer, 100)
    optimizer.add_param_group({"params": model.dbnet.parameters()})
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=1000, warmup_steps=100)
    assert codes(report) == ["NH348"]
    optimizer.step()
    with pytest.raises(ValueError, match="zip") as caught:
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [2e-5, 1e-3]
    assert finding(report, "NH348").notes == (f"its next step raises ValueError: {caught.value}",)


@pytest.mark.parametrize("num_steps", [None, 5000])
def test_a_schedule_that_is_0_everywhere_is_found(num_steps):
    model, optimizer = adam()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    report = nanhunt.audit_optimizer(model, optimizer, scheduler=scheduler, num_steps=num_steps, warmup_steps=100)
    assert codes(report) == ["NH347"]
    assert f"is 0 in each of {num_steps or 10_000:,} steps, by the LambdaLR" in finding(report, "NH347").message


def test_a_rate_of_0_without_a_schedule_is_found_unless_a_schedule_has_left_its_mark():
    model, optimizer = adam(0.0)
    assert codes(nanhunt.audit_optimizer(model, optimizer)) == ["NH347"]
    model, optimizer = adam()
    lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert codes(nanhunt.audit_optimizer(model, optimizer)) == []


# Clipping


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(model, batch_for(model))).backward()
    return scaler


def test_clipping_before_unscaling_is_found():
    model, optimizer = adam()
    scaler = scaled(model, optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    report = nanhunt.audit_optimizer(model, optimizer, scaler=scaler, max_grad_norm=1.0)
    assert codes(report) == ["NH337"]
    assert finding(report, "NH337").evidence["scale"] == 1024.0


def test_clipping_after_unscaling_passes_and_unclipped_gradients_are_a_skip():
    model, optimizer = adam()
    scaler = scaled(model, optimizer)
    early = nanhunt.audit_optimizer(model, optimizer, scaler=scaler, max_grad_norm=0.01)
    assert codes(early) == []
    assert any("not known which comes first" in skip.reason for skip in early.skips)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    report = nanhunt.audit_optimizer(model, optimizer, scaler=scaler, max_grad_norm=0.01)
    assert codes(report) == []
    assert "NH337" in report.passes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.inf, "clipping turns 5 to zeros, of 6 gradients; 1 is non-finite before"),
        (math.nan, "clipping turns 5 more to non-finite values, of 6 gradients; 1 is non-finite before"),
        (3e19, "clipping turns 6 to zeros, of 6 gradients; all of them are finite before"),
    ],
)
def test_what_clipping_makes_of_the_gradients_is_tried(value, message):
    model, optimizer = adam()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.dbnet.bias.grad[0] = value
    report = nanhunt.audit_optimizer(model, optimizer, max_grad_norm=1.0)
    assert finding(report, "NH338").message == message


def test_nobody_saying_whether_there_is_clipping_is_a_skip():
    report = nanhunt.audit_optimizer(*adam())
    assert any(skip.what == "clipping" for skip in report.skips)
