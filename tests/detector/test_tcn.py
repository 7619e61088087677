"""The encoder's span and the shapes of both convolutional ends."""

from dataclasses import replace

import pytest
import torch

from detector.config import PRESETS, V3, ModelConfig
from detector.tcn import TcnEncoder, UpsamplingDecoder

NARROW = replace(V3.model, tcn_channels=(4, 4, 4, 4))


def reached_samples(config: ModelConfig, length: int) -> torch.Tensor:
    """Which input samples the middle output step depends on, with weights that cannot cancel."""
    encoder = TcnEncoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    windows = torch.ones(1, config.num_channels, length, dtype=torch.float64, requires_grad=True)
    encoder.double()(windows)[..., length // 32].sum().backward()
    return windows.grad.abs().sum((0, 1)) > 0


def test_receptive_field_is_six_seconds_without_a_hole():
    reached = reached_samples(NARROW, 4096).nonzero().flatten()

    assert len(reached) == 1615
    assert reached[-1] - reached[0] + 1 == 1615
    assert reached[0] + 807 == 2048  # centred: output step 128 looks as far ahead as back


def test_every_input_sample_is_read():
    torch.manual_seed(0)
    encoder = TcnEncoder(replace(NARROW, tcn_channels=(16, 16, 16, 16))).eval()
    windows = torch.randn(1, 19, 512, requires_grad=True)

    encoder(windows).square().sum().backward()

    assert (windows.grad.abs().sum((0, 1)) > 0).all()


@pytest.mark.parametrize("samples", [16, 160, 2560])
def test_shapes_mirror(samples):
    encoder, decoder = TcnEncoder(NARROW), UpsamplingDecoder(NARROW)

    features = encoder(torch.randn(2, 19, samples))

    assert features.shape == (2, 4, samples // 16)
    assert decoder(features).shape == (2, 19, samples)


def test_activations_keep_their_scale_at_the_start():
    torch.manual_seed(0)
    encoder, decoder = TcnEncoder(V3.model).eval(), UpsamplingDecoder(V3.model).eval()

    features = encoder(torch.randn(1, 19, 2560))

    assert 0.2 < features.square().mean() < 5  # mean square of the input is 1
    assert 0.2 < decoder(features).square().mean() < 5


def test_channels_are_the_configured_ones():
    widths = [layer.out_channels for layer in TcnEncoder(PRESETS["v3"].model).layers if hasattr(layer, "out_channels")]

    assert widths == [64, 64, 128, 128, 256, 256, 512, 512]


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="must be odd"):
        TcnEncoder(replace(NARROW, tcn_kernel_size=6))
