"""What a traced loop tells of magnitudes: that of each module, at each sampled step."""

import math

import pytest
import torch
from torch import nn

import nanhunt


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -5.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    return model


def test_the_report_holds_the_largest_output_and_gradient_of_each_module_and_step(model):
    with nanhunt.trace(model) as hunt:
        for scale in (1.0, 10.0):
            model(torch.tensor([[scale, scale]])).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.0).step()
    seen = hunt.report().magnitudes
    assert seen.steps[:2] == (0, 1)
    both = zip(seen.modules, seen.activations, seen.gradients, strict=True)
    told = {name: (row[:2], slope[0]) for name, row, slope in both}
    # Outputs (3, -5), then 3 - 10; the gradient by the first layer's outputs is the second layer's weights.
    assert told["0"] == ((5.0, 50.0), 2.0)
    assert told["1"] == ((7.0, 70.0), 1.0)


def test_a_non_finite_output_is_told_as_it_is(model):
    with nanhunt.trace(model) as hunt:
        model(torch.tensor([[math.inf, 1.0]])).sum().backward()
    seen = hunt.report().magnitudes
    assert not any(math.isfinite(row[0]) for row in seen.activations)


def test_without_a_look_at_what_is_finite_there_are_none(model):
    with nanhunt.trace(model, finite=False) as hunt:
        model(torch.ones(1, 2)).sum().backward()
    assert hunt.report().magnitudes is None
    with nanhunt.trace() as hunt:
        pass
    assert hunt.report().magnitudes is None
