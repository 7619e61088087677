"""What is wrong with fresh weights is found; the model given is not changed."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nanhunt.audit.init import audit_init
from nanhunt.audit.init_weights import documented_std, fan_in, init_name
from nanhunt.errors import NanhuntError
from nanhunt.findings import Finding, Report
from nanhunt.reports.console import render
from nanhunt.reports.json_report import render as render_json


def mlp(depth: int = 8, gain: float | None = None, act: type[nn.Module] = nn.ReLU, width: int = 64) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), act())][:-1]
    for layer in layers:
        if isinstance(layer, nn.Linear) and gain is not None:
            nn.init.xavier_uniform_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def vectors() -> Tensor:
    return torch.randn(64, 64)


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


@pytest.mark.parametrize("gain", [0.2, 0.1, 0.01])
def test_eight_relu_layers_of_a_small_gain_vanish(gain):
    found = only(audit_init(lambda: mlp(gain=gain), vectors()))
    assert (found.code, found.severity, found.location.module) == ("NH711", "error", "14")
    assert found.notes == (
        f"8 of 8 layers look like xavier gain {gain:g}: gain {gain:.2g}; 1.41 keeps the scale through ReLU, 1 without",
        "the gradient vanishes alike on its way back",
    )


def test_the_fall_is_that_of_a_plain_forward_pass_in_float64():
    x = vectors()
    found = only(audit_init(lambda: mlp(gain=0.1), x))
    torch.manual_seed(0)
    model, x = mlp(gain=0.1).double(), x.double()
    with torch.no_grad():
        first, last = (float((out - out.mean(0)).square().mean().sqrt()) for out in (model[:1](x), model(x)))
    (lowest, _, highest), tolerance = found.evidence["last_variation"], 1 + 1e-5
    assert lowest / tolerance <= last <= highest * tolerance
    assert last / first <= found.evidence["fall_min_over_inits"] * tolerance


def test_the_default_of_torch_vanishes_over_sixteen_layers():
    found = only(audit_init(lambda: mlp(24), vectors()))
    assert found.code == "NH711"
    assert found.notes[0].startswith("24 of 24 layers look like default: gain 0.58")


def test_weights_of_deviation_one_explode():
    def build():
        model = mlp()
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
        return model

    found = only(audit_init(build, vectors()))
    assert (found.code, found.location.module) == ("NH712", "14")
    assert "the gradient explodes alike on its way back" in found.notes


class Squeezed(nn.Module):
    """Each layer hands its gradient on at a hundredth; the signal stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = 0.01 * x + 0.99 * x.detach()
        return x


def test_a_gradient_that_vanishes_alone_is_told_apart():
    found = only(audit_init(Squeezed, vectors()))
    assert (found.code, found.location.phase, found.location.module) == ("NH713", "backward", "layers.0")


def test_batch_norm_without_residuals_explodes_backwards():
    def build():
        layers = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(64, 1))

    assert only(audit_init(build, vectors())).code == "NH714"


def test_units_behind_a_large_negative_bias_are_dead():
    def build():
        model = mlp(3)
        nn.init.constant_(model[2].bias, -20.0)
        return model

    found = audit_init(build, vectors()).findings
    assert [finding.code for finding in found] == ["NH715"]
    assert found[0].message == "64 of 64 units behind 2 are 0 for all 64 samples and positions"


def test_raw_inputs_saturate_tanh():
    found = audit_init(lambda: mlp(3, act=nn.Tanh), 100 * vectors()).findings
    assert [(finding.code, finding.location.module) for finding in found] == [("NH716", "0")]


def test_functional_activations_are_seen_as_well():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    assert [one.code for one in audit_init(Net, 100 * vectors()).findings] == ["NH716"]


class Deaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * 0)


def test_an_output_that_does_not_depend_on_the_input_is_found():
    assert "NH717" in [finding.code for finding in audit_init(Deaf, vectors()).findings]


def test_two_zero_layers_in_a_row_block_each_other():
    def build():
        model = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 4, bias=False))
        for layer in model:
            nn.init.zeros_(layer.weight)
        return model

    found = only(audit_init(build, vectors()))
    assert (found.code, found.message) == (
        "NH718",
        "0.weight and 1.weight: weights and gradient 0, also after training a little",
    )


def test_a_layer_that_is_never_called_is_unused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(64, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = only(audit_init(Net, vectors()))
    assert (found.code, found.severity) == ("NH719", "warning")
    assert found.message == "the backward pass does not come to 2 parameters of 4: spare.weight, spare.bias"


def test_constant_weights_make_equal_units():
    def build():
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))
        for layer in (model[0], model[2]):
            nn.init.constant_(layer.weight, 0.01)
            nn.init.zeros_(layer.bias)
        return model

    found = only(audit_init(build, vectors()))
    assert (found.code, found.location.tensor) == ("NH720", "0.weight")


def test_weights_that_are_not_finite_are_found_before_all_else():
    def build():
        model = mlp(2)
        nn.init.constant_(model[0].weight, math.nan)
        return model

    found = only(audit_init(build, vectors()))
    assert (found.code, found.message) == ("NH710", "0.weight holds 4,096 non-finite elements before training")


class Rooted(nn.Module):
    """Two seeds of three have a finite gradient at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)
        self.offset = float(torch.initial_seed() % 3 != 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + (h.square() * self.offset).sum(-1, keepdim=True).sqrt())


def test_a_gradient_that_is_not_finite_for_one_seed_is_found():
    found = only(audit_init(Rooted, vectors()))
    assert (found.code, found.severity, found.location.module) == ("NH710", "error", "first")
    assert found.message == "the gradient at first is not finite in 1 of 3 initialisations, though the output is"
    assert audit_init(Rooted, vectors(), num_inits=2).findings == ()


# What is given stays as it was


def test_neither_the_model_nor_the_batch_nor_a_random_generator_changes():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(64, 3))
    model.eval()
    model(vectors()).sum().backward()
    batch = vectors()
    kept = copy.deepcopy((model.state_dict(), [own.grad for own in model.parameters()], batch))
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    report = audit_init(model, batch, lambda model, x: model(x.mul_(2)).square().mean())
    assert dict(report.facts)["initialisations"] == "1, seed 0"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept[0].items())
    assert all(torch.equal(own.grad, grad) for own, grad in zip(model.parameters(), kept[1], strict=True))
    assert torch.equal(batch, kept[2])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_audits_say_the_same():
    first, second = (audit_init(lambda: mlp(4), torch.ones(8, 64).cumsum(0)) for _ in range(2))
    assert first.tables == second.tables


class Lottery(nn.Module):
    """Its last layer hands on a gradient whose size depends on the seed alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)
        self.factor = 100.0 ** (torch.initial_seed() % 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.factor * (h - h.detach()))


def test_a_gradient_that_only_some_seeds_make_large_is_a_note_and_no_finding():
    report = audit_init(Lottery, vectors())
    assert report.findings == ()
    assert "; between initialisations the gradient of first ranges from " in report.tables[0].note


# What cannot be done is said


def test_no_batch_is_one_line():
    with pytest.raises(NanhuntError, match=r"no batch to run .* on; give a capture"):
        audit_init(mlp)


def test_a_model_that_fails_on_the_batch_is_one_line():
    with pytest.raises(NanhuntError, match="the model fails on the batch: RuntimeError: mat1 and mat2"):
        audit_init(mlp, torch.randn(4, 3))


def test_a_loss_without_gradient_is_a_skip():
    report = audit_init(lambda: mlp(2), vectors(), lambda model, x: model(x).detach().sum())
    assert "gradients" in {skip.what for skip in report.skips}
    assert report.findings == ()


def test_the_report_fits_eighty_columns_and_goes_to_json():
    report = audit_init(lambda: mlp(40, gain=0.1, width=16), torch.randn(64, 16))
    assert max(map(len, render(report).splitlines())) <= 80
    assert report.tables[0].rows[0][0] == "0"
    assert len(report.tables[0].rows) == 24
    assert [finding["code"] for finding in json.loads(render_json(report))["findings"]] == ["NH711"]


# What weights look like


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(200, 300),
        nn.Conv2d(16, 32, 5),
        nn.Conv1d(16, 32, 9, groups=4),
        nn.ConvTranspose1d(32, 16, 8, stride=4),
        nn.LSTM(64, 100),
        nn.GRUCell(64, 100),
        nn.Embedding(300, 64),
        nn.MultiheadAttention(64, 4),
        nn.Bilinear(20, 30, 40),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_classes_document_is_what_they_draw(layer):
    weight = next(layer.parameters()).detach()
    documented, std = documented_std(layer, weight), float(weight.std())
    assert std == pytest.approx(documented, rel=0.03)
    assert init_name([std], weight, documented, fan_in(layer, weight)) == "default"


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (nn.init.xavier_uniform_, "xavier"),
        (lambda weight: nn.init.xavier_normal_(weight, 0.1), "xavier gain 0.1"),
        (lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"), "kaiming for relu"),
        (lambda weight: nn.init.normal_(weight, std=0.02), "std 0.02"),
        (nn.init.zeros_, "zeros"),
        (lambda weight: nn.init.normal_(weight, std=1.0), "24.5 x default"),
    ],
)
def test_other_ways_to_draw_weights_are_told(draw, name):
    torch.manual_seed(0)
    layer = nn.Linear(200, 300)
    draw(layer.weight)
    weight = layer.weight.detach()
    is_zero = not weight.any()
    found = init_name([float(weight.std())], weight, documented_std(layer, weight), 200, is_zero=is_zero)
    assert found.endswith("x default") if name.endswith("x default") else found == name


def test_a_transposed_convolution_keeps_the_scale_that_its_gain_says():
    layer = nn.ConvTranspose1d(64, 32, 8, stride=4, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(fan_in(layer, layer.weight)))
    assert float(layer(torch.randn(16, 64, 200)).detach()[..., 8:-8].std()) == pytest.approx(1.0, rel=0.05)
