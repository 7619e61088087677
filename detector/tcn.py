"""The convolutional ends of the detector: an encoder down to the rate of the streams, and a decoder back."""

import math
from itertools import pairwise

from torch import Tensor, nn

from detector.config import ModelConfig

UPSAMPLING_KERNEL = 4


class TcnEncoder(nn.Module):
    """Dilated, non-causal convolutions that halve the rate once per stage.

    Each stage has two layers of convolution, ReLU and dropout of whole channels (neighbouring samples are too alike
    for single dropped ones to matter, and drawing them takes longer than the convolution). The first has stride 2
    and dilation ``2^s | 1``, the second, at the halved rate, dilation ``2^s``: in input samples ``4^s`` (the next
    odd multiple) and ``2 * 4^s``, the dilations 1, 2, 4, ... 128 of eight layers at full rate. The receptive field
    is 1615 samples, 6.3 s at 256 Hz (1531 at full rate). The strided dilation is odd because an even one reads
    every second sample only, and half of what the stage before it computed would be lost.

    Weights start normal with variance 2 / fan-in, so that activations keep their scale through eight layers without a
    norm; biases start at zero.

    Args:
        config: Sizes; ``tcn_channels``, ``tcn_kernel_size`` and ``tcn_dropout`` are read.

    Raises:
        ValueError: If the kernel size is even.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.tcn_kernel_size % 2 == 0:
            raise ValueError(f"tcn_kernel_size must be odd to keep time centred, got {config.tcn_kernel_size}")
        layers: list[nn.Module] = []
        width = config.num_channels
        for stage, channels in enumerate(config.tcn_channels):
            for stride, dilation in ((2, 2**stage | 1), (1, 2**stage)):
                layers += [_conv(width, channels, config.tcn_kernel_size, stride, dilation), nn.ReLU()]
                layers.append(nn.Dropout1d(config.tcn_dropout))
                width = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, windows_BCL: Tensor) -> Tensor:
        """(batch, num_channels, samples) to (batch, tcn_channels[-1], samples / stride)."""
        return self.layers(windows_BCL)


def _conv(width: int, channels: int, kernel_size: int, stride: int, dilation: int) -> nn.Conv1d:
    """A centred convolution that starts with variance 2 / fan-in and zero bias."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv1d(width, channels, kernel_size, stride=stride, dilation=dilation, padding=padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv1d declares an optional bias
    return conv


class UpsamplingDecoder(nn.Module):
    """Mirror of the encoder: one transposed convolution (kernel 4, stride 2) per stage, ReLU between them.

    The last stage has as many channels as the input has and no activation. Weights start normal with variance
    2 / fan-in, where a transposed convolution of stride 2 adds up kernel / 2 taps per output; biases start at zero.

    Args:
        config: Sizes; ``tcn_channels`` and ``num_channels`` are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [*reversed(config.tcn_channels), config.num_channels]
        layers: list[nn.Module] = []
        for width, channels in pairwise(widths):
            conv = nn.ConvTranspose1d(width, channels, UPSAMPLING_KERNEL, stride=2, padding=1)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (width * UPSAMPLING_KERNEL / 2)))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # as above
            layers += [conv, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features_BCT: Tensor) -> Tensor:
        """(batch, tcn_channels[-1], steps) to (batch, num_channels, steps * stride)."""
        return self.layers(features_BCT)
