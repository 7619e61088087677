"""Zeros that are meant and zeros that block; how far a signal falls; a loss that runs another model."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from nanhunt.audit.init import audit_init
from nanhunt.errors import NanhuntError


class Branch(nn.Module):
    """A residual branch whose last layer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.first(x)))


def zero_branch_and_head() -> nn.Sequential:
    head = nn.Linear(16, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.Linear(8, 16), Branch(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), head)


def error(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


def test_a_zero_branch_before_a_zero_head_is_healthy():
    report = audit_init(zero_branch_and_head, torch.randn(32, 8), error)
    assert report.findings == ()
    assert [row[-1] for row in report.tables[1].rows] == ["zeros", "zeros"]


class Factors(nn.Module):
    """Two bare factors beside a layer."""

    def __init__(self, b: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.full((4, 4), b))
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def test_two_bare_factors_of_zeros_block_each_other():
    (found,) = audit_init(Factors, torch.randn(32, 8), error).findings
    assert (found.code, found.message) == ("NH718", "a and b: weights and gradient 0, also after training a little")


def test_one_bare_factor_of_zeros_does_not():
    assert audit_init(lambda: Factors(0.5), torch.randn(32, 8), error).findings == ()


class Unrouted(nn.Module):
    """A zero layer that no sample is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.expert = nn.Linear(8, 4), nn.Linear(8, 4)
        nn.init.zeros_(self.expert.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.expert(x) * (x[:, :1] > 1e6)


def test_a_zero_layer_without_a_gradient_for_another_reason_is_not_blocked_by_zeros():
    assert audit_init(Unrouted, torch.randn(32, 8), error).findings == ()


def stack(gain: float) -> nn.Sequential:
    """Eight hidden layers of little gain, with biases as large as ever."""
    layers: list[nn.Module] = [nn.Linear(16, 64), nn.ReLU()]
    for _ in range(8):
        layer = nn.Linear(64, 64)
        nn.init.xavier_uniform_(layer.weight, gain)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 4))


def fall_in_float64(gain: float, x: Tensor) -> list[float]:
    """First over last variation over the samples, for the three seeds."""
    falls = []
    for seed in range(3):
        torch.manual_seed(seed)
        values, seen = x.double(), []
        for layer in stack(gain).double():
            values = layer(values).detach()
            if isinstance(layer, nn.Linear):
                seen.append((values - values.mean(0)).square().mean().sqrt().item())
        falls.append(seen[0] / seen[-1])
    return falls


@pytest.mark.parametrize("gain", [0.1, 0.2])
def test_a_fall_is_that_of_float64_whatever_the_biases(gain):
    x = torch.randn(32, 16)
    (found,) = audit_init(lambda: stack(gain), x, lambda m, b: m(b).square().mean()).findings
    told = float(re.search(r"falls by ([0-9.e+]+) over", found.message)[1])
    truth = fall_in_float64(gain, x)
    assert min(truth) / 2 < told < max(truth) * 2


def test_what_float64_does_not_resolve_is_a_bound():
    (found, *_) = audit_init(lambda: stack(1e-4), torch.randn(32, 16), lambda m, b: m(b).square().mean()).findings
    assert found.code == "NH711"
    assert re.search(r"falls by more than 1e1[567] over", found.message)


def test_the_note_names_the_layers_that_are_out_of_scale():
    (found,) = audit_init(lambda: stack(5.0), torch.randn(32, 16), lambda m, b: m(b).square().mean()).findings
    assert found.code == "NH712"
    assert found.notes[0].startswith("8 of 10 layers look like 8.7 x default: gain 5;")


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def test_a_loss_that_runs_the_callers_model_is_refused_and_leaves_it_as_it_was():
    model = norm_net()
    model[0].weight.grad = gradient = torch.ones(8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NanhuntError, match="the loss does not use the model that it is given"):
        audit_init(model, torch.randn(16, 8), lambda given, batch: model(batch).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(8, 8))
    assert model[2].weight.grad is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_loss_may_use_the_callers_model_beside_the_copy():
    model = norm_net()
    mean = model[1].running_mean.clone()
    report = audit_init(
        model, torch.randn(16, 8), lambda given, batch: (given(batch) - model(batch).detach()).sub(1).square().mean()
    )
    assert report.findings == ()
    assert torch.equal(model[1].running_mean, mean)


def test_a_loss_that_needs_no_forward_uses_the_model_too():
    report = audit_init(
        nn.Linear(8, 4), torch.randn(16, 8), lambda given, batch: (batch @ given.weight.T).square().sum()
    )
    assert [found.code for found in report.findings] in ([], ["NH719"])


def test_what_makes_batches_is_no_batch():
    with pytest.raises(NanhuntError, match="the batch, a generator, cannot be copied"):
        audit_init(norm_net, (torch.randn(16, 8) for _ in range(2)), lambda m, b: m(next(b)).sum())
