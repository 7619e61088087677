"""Causes of what was non-finite before the step, told end to end: inputs, labels, weights, buffers, moments, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanhunt


def traced(run, model=None, optimizer=None):
    with nanhunt.trace(model, optimizer) as hunt:
        run()
    return hunt.report()


def regression(batches, loss=F.mse_loss, model=None):
    """Trains a linear model on pairs; the report."""
    torch.manual_seed(0)
    model = model or nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run():
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    return traced(run, model, optimizer).first


def pairs(num=3):
    torch.manual_seed(1)
    return [[torch.randn(8, 4), torch.randn(8, 1)] for _ in range(num)]


# Inputs and labels


def test_a_bad_sample_is_an_input():
    batches = pairs()
    batches[1][0][5, 2] = torch.nan
    finding = regression(batches)
    assert (finding.code, finding.name, finding.location.phase) == ("NH601", "non-finite-input", "data")
    assert finding.message == "input 0 holds 1 NaN among 32 elements, first at [5, 2]"
    assert finding.evidence == {"num_nonfinite": 1, "first_position": [5, 2], "sample": 5, "num_samples": 1}
    assert finding.notes == ("1 of 8 samples affected",)


def test_a_bad_channel_is_told():
    batches = pairs()
    batches[1][0][:, 3] = torch.inf
    finding = regression(batches)
    assert finding.code == "NH601"
    assert "every one of 8 samples is affected" in finding.notes
    assert "non-finite throughout the batch at 3 of dimension 1" in finding.notes


def test_a_bad_sample_throughout_is_told():
    batches = pairs()
    batches[1][0][6] = torch.nan
    finding = regression(batches)
    assert "1 sample non-finite throughout" in finding.notes


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), F.smooth_l1_loss, nn.L1Loss()])
def test_what_a_loss_calls_its_target_is_a_label(loss):
    batches = pairs()
    batches[1][1][6, 0] = torch.nan
    finding = regression(batches, loss)
    assert (finding.code, finding.name, finding.location.phase) == ("NH603", "non-finite-label", "data")
    assert finding.location.step == 1
    assert finding.evidence["sample"] == 6


def test_a_label_is_known_by_its_name_where_the_loss_is_by_hand():
    batches = pairs()
    batches[1][1][6, 0] = torch.nan
    finding = regression(batches, lambda pred, target: ((pred - target) ** 2).mean())
    assert finding.code == "NH603"
    assert "target" in finding.message


def test_a_label_given_to_the_model_is_known_by_the_argument_of_its_forward():
    class WithLoss(nn.Linear):
        def forward(self, x, labels):
            return F.mse_loss(super().forward(x), labels)

    torch.manual_seed(0)
    model = WithLoss(4, 1)
    x, y = pairs()[0]
    y[2, 0] = torch.inf
    finding = traced(lambda: model(x, y).backward(), model).first
    assert finding.code == "NH603"
    assert finding.location.tensor == "input 1 (labels of WithLoss)"


def test_the_input_of_a_model_that_is_called_weight_is_no_weight_of_a_loss():
    class Weighted(nn.Linear):
        def forward(self, x, weight):
            return super().forward(x * weight)

    torch.manual_seed(0)
    model = Weighted(4, 1)
    weight = torch.tensor([1.0, torch.inf, 1.0, 1.0])
    finding = traced(lambda: model(torch.ones(3, 4), weight).sum().backward(), model).first
    assert finding.code == "NH601"


def test_the_weight_of_a_class_is_told():
    weight = 1 / torch.tensor([4.0, 0.0, 4.0])
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    finding = traced(lambda: F.cross_entropy(model(torch.randn(4, 4)), labels, weight=weight).backward(), model).first
    assert (finding.code, finding.name) == ("NH605", "non-finite-loss-weight")
    assert finding.location.tensor == "weight of cross_entropy"


def test_a_prediction_is_no_label():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.bias.fill_(torch.nan)
    finding = traced(lambda: F.mse_loss(model(torch.randn(3, 4)), torch.zeros(3, 1)).backward(), model).first
    assert finding.code == "NH702"


# State


def test_a_weight_says_that_its_moments_are_lost_as_well():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[0, 2] = torch.nan
        optimizer.state[model.weight]["exp_avg"][0, 2] = torch.nan

    def run():
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    finding = traced(run, model, optimizer).first
    assert (finding.code, finding.name, finding.location.phase) == ("NH702", "poisoned-parameter", "weights")
    assert finding.message == "parameter weight holds 1 NaN among 4 elements before the step, first at [0, 2]"
    assert any("1 tensor of optimizer state non-finite as well" in note for note in finding.notes)


def test_a_moment_alone_poisons_finite_weights():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["momentum_buffer"][0, 1] = torch.inf

    def run():
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    finding = traced(run, model, optimizer).first
    assert (finding.code, finding.location.phase) == ("NH704", "optimizer")
    assert finding.location.tensor == "momentum_buffer of weight"
    assert "the weights were finite until the optimizer used it" in finding.notes


def test_running_statistics_are_read_in_evaluation_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].running_mean[1] = torch.inf
    model.eval()
    finding = traced(lambda: model(torch.randn(3, 4)), model).first
    assert (finding.code, finding.name, finding.location.tensor) == ("NH703", "poisoned-buffer", "0.running_mean")
    assert "training normalises by the batch and stays finite; evaluation reads this buffer" in finding.notes


@pytest.fixture
def _filled_memory():
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("_filled_memory")
def test_memory_that_nobody_wrote_is_told_with_the_operation_it_came_from():
    model = nn.Linear(4, 1)

    def run():
        scale = torch.empty(4)
        model(torch.ones(3, 4) * scale).sum().backward()

    finding = traced(run, model).first
    assert (finding.code, finding.name) == ("NH705", "uninitialised-memory")
    assert "it came from aten::empty" in finding.message


def test_a_plain_attribute_is_no_buffer():
    model = nn.Linear(4, 1)
    model.deviation = torch.tensor([1.0, torch.inf, 1.0, 1.0])
    finding = traced(lambda: model(torch.ones(3, 4) * model.deviation).sum().backward(), model).first
    assert (finding.code, finding.location.tensor) == ("NH707", "deviation")
