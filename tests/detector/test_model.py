"""The whole detector: presets, shapes, and that it hides nothing."""

from dataclasses import replace

import pytest
import torch

from detector.config import PRESETS
from detector.losses import focal_loss
from detector.model import SeizureDetector

SMALL = PRESETS["small"].model


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_each_preset_runs_and_every_parameter_gets_a_finite_gradient(name):
    torch.manual_seed(0)
    model = SeizureDetector(PRESETS[name].model)
    windows = torch.randn(2, 19, 320)
    labels = (torch.rand(2, 320) < 0.5).float()

    logits = model(windows)
    focal_loss(logits, labels, alpha=0.5, gamma=2.0).backward()

    assert logits.shape == (2, 320)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.isfinite().all()] == []


def test_parameter_counts():
    assert {name: count_parameters(SeizureDetector(config.model)) for name, config in PRESETS.items()} == {
        "v3": 5_738_648,
        "incident": 5_738_648,
        "small": 37_916,
        "small-incident": 37_916,
    }


def test_the_seed_fixes_the_weights():
    torch.manual_seed(7)
    first = SeizureDetector(SMALL).state_dict()
    torch.manual_seed(7)
    second = SeizureDetector(SMALL).state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluation_is_repeatable_and_windows_do_not_see_each_other():
    torch.manual_seed(0)
    model = SeizureDetector(SMALL).eval()
    windows = torch.randn(3, 19, 160)

    with torch.no_grad():
        together = model(windows)
        alone = torch.cat([model(window.unsqueeze(0)) for window in windows])

    with torch.no_grad():
        assert torch.equal(model(windows), together)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_logits_move_within_a_stride():
    torch.manual_seed(0)
    logits = SeizureDetector(SMALL).eval()(torch.randn(1, 19, 160))

    assert (logits.view(10, 16).std(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["small", "v3"])
@pytest.mark.parametrize("value", [0.0, 1.0, -123.9])
def test_flat_input_gives_finite_logits(name, value):
    torch.manual_seed(0)
    model = SeizureDetector(PRESETS[name].model).eval()

    with torch.no_grad():
        assert model(torch.full((1, 19, 160), value)).isfinite().all()


def test_flat_channels_give_finite_gradients_with_a_detached_encoding():
    torch.manual_seed(0)
    model = SeizureDetector(SMALL)
    windows = torch.randn(2, 19, 320)
    windows[0] = 0
    windows[1, 3:] = 0

    focal_loss(model(windows), torch.zeros(2, 320), alpha=0.5, gamma=2.0).backward()

    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_not_hidden(bad):
    model = SeizureDetector(replace(SMALL, gnn_layers=1)).eval()
    windows = torch.randn(1, 19, 160)
    windows[0, 2, 80] = bad

    # eigh refuses a non-finite matrix; what may not happen is a finite answer.
    try:
        logits = model(windows)
    except torch.linalg.LinAlgError:
        return
    assert not logits.isfinite().all()


def test_a_gradient_reaches_the_edge_stream_with_a_detached_encoding():
    torch.manual_seed(0)
    model = SeizureDetector(SMALL)

    model(torch.randn(1, 19, 320)).square().mean().backward()

    assert model.edge_stream.lift.weight.grad.abs().max() > 0


def test_the_encoding_changes_the_gradient_of_the_edge_stream():
    gradients = {}
    for mode in ("detached", "through_eigh"):
        torch.manual_seed(0)
        model = SeizureDetector(replace(SMALL, pe_gradient=mode)).eval()
        model(torch.randn(1, 19, 320, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        gradients[mode] = model.edge_stream.lift.weight.grad
        assert gradients[mode].isfinite().all()

    assert not torch.allclose(gradients["detached"], gradients["through_eigh"])


def test_runs_under_autocast_with_finite_gradients():
    torch.manual_seed(0)
    model = SeizureDetector(SMALL)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(1, 19, 320))
        loss = focal_loss(logits, torch.zeros(1, 320), alpha=0.5, gamma=2.0)
    loss.backward()

    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 18, 160), (19, 160), (1, 19, 0), (1, 19, 167)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"windows must be|multiple of 16"):
        SeizureDetector(SMALL)(torch.zeros(shape))
