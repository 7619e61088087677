"""A tensor of a batch as samples, channels and positions, with its padding set apart.

Shape letters: B sample, C channel, T position within a channel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DISTINCT = 16
MAX_ZERO_SHARE = 0.4
CLEAR_RATIO = 4
"""A shorter axis is that of the channels for sure if the other is at least so many times as long."""

_LAST_DIGITS = 4


class Layout(NamedTuple):
    """Samples, channels and positions.

    Attributes:
        values_BCT: float64, non-finite values as 0.
        valid_BT: Positions that are not padding.
        broken_BC: Channels with a non-finite value.
        is_waveform: Whether positions follow each other in one dimension, and there are many of them.
        is_clear: Whether it is beyond doubt which axis holds the channels.
        eps: Relative spacing of the element type.
    """

    values_BCT: Tensor
    valid_BT: Tensor
    broken_BC: Tensor
    is_waveform: bool
    is_clear: bool
    eps: float

    @property
    def num_valid_B1(self) -> Tensor:
        """Positions of each sample that are not padding."""
        return self.valid_BT.sum(1, keepdim=True)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (B, C), over what is not padding; 0 where there is nothing.

        The number of positions is clamped to at least 1: an empty sample has a sum of 0, and 0 / 0 is to be 0 here.
        """
        number_B1 = self.num_valid_B1.clamp(min=1)
        valid_B1T = self.valid_BT[:, None]
        mean_BC = (self.values_BCT * valid_B1T).sum(2) / number_B1
        square_BC = ((self.values_BCT - mean_BC[..., None]).square() * valid_B1T).sum(2) / number_B1
        return mean_BC, square_BC.sqrt()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each channel, (B, C); infinite where there is nothing."""
        valid_B1T = self.valid_BT[:, None]
        low_BC = torch.where(valid_B1T, self.values_BCT, math.inf).amin(2)
        return low_BC, torch.where(valid_B1T, self.values_BCT, -math.inf).amax(2)


def lay_out(tensor: Tensor) -> Layout | None:
    """The tensor by sample, channel and position; None where it has fewer than two axes or no elements.

    A matrix is samples of one channel. Otherwise the second axis is that of the channels, unless it is longer than the
    last: sequences of feature vectors, and images with their colours last.
    """
    if tensor.dim() < 2 or not tensor.numel():
        return None
    eps = torch.finfo(tensor.dtype).eps
    wide = tensor.double()
    is_finite = torch.isfinite(wide)
    values = torch.where(is_finite, wide, 0.0)
    if tensor.dim() == 2:
        values, is_finite = values[:, None], is_finite[:, None]
    elif tensor.shape[1] > tensor.shape[-1]:
        values, is_finite = values.movedim(-1, 1), is_finite.movedim(-1, 1)
    values, is_finite = values.flatten(2), is_finite.flatten(2)
    num_channels, num_positions = values.shape[1:]
    is_clear = num_positions >= CLEAR_RATIO * num_channels
    is_waveform = tensor.dim() == 3 and num_positions >= 64 and is_clear
    valid_BT = ~_padding(values)
    if tensor.dim() > 3:
        valid_BT = torch.ones_like(valid_BT)
    return Layout(values, valid_BT, ~is_finite.all(2), is_waveform, is_clear, eps)


def _padding(values_BCT: Tensor) -> Tensor:
    """Runs of zeros at either end of a sample, in all channels alike."""
    zero_BT = (values_BCT == 0).all(1).int()
    leading_BT = zero_BT.cumprod(1)
    trailing_BT = zero_BT.flip(1).cumprod(1).flip(1)
    return (leading_BT + trailing_BT).bool()


def unlike_signals(layout: Layout) -> str:
    """Why the values are no measurements whose scale or shape could be judged; empty where they may be."""
    values = layout.values_BCT
    kept = values.transpose(1, 2)[layout.valid_BT]
    if not kept.numel():
        return "all its values are 0"
    zero_share = float((kept == 0).double().mean())
    # Channels that are 0 throughout beside others that hardly ever are 0 are dead, not sparse.
    live = ~((values == 0).all(2) | layout.broken_BC)
    live_zero = ((values == 0) & layout.valid_BT[:, None]).sum(2)[live].sum()
    live_total = layout.num_valid_B1.expand_as(live)[live].sum()
    live_share = float(live_zero / live_total) if live_total else 1.0
    if zero_share > MAX_ZERO_SHARE and live_share > MAX_ZERO_SHARE / 4:
        return f"{zero_share:.0%} of its values are exactly 0: sparse, one-hot or masked"
    num_distinct = int(kept.flatten()[:100_000].unique().numel())
    if num_distinct == 1:
        return f"all its values are {float(kept.flatten()[0]):g}"
    if num_distinct <= MAX_DISTINCT and not _is_drowned(kept, layout.eps):
        return f"it holds only {num_distinct} different values"
    return ""


def moves(low: Tensor, high: Tensor, eps: float) -> Tensor:
    """Whether values between these differ by more than the rounding errors of a constant that was standardised."""
    size = torch.maximum(low.abs(), high.abs())
    return high - low > torch.where(is_large(size, eps), 0.0, _LAST_DIGITS * eps * size)


def is_large(size: Tensor, eps: float) -> Tensor:
    """Whether values are beyond the scale of weights and of standardised data: 2,900 in float32, 32 in float16."""
    return size > eps**-0.5


def _is_drowned(values: Tensor, eps: float) -> bool:
    """Whether few values are left of a signal beside a large offset: they lie as close as the type allows."""
    size, spread = values.abs().amax(), values.amax() - values.amin()
    return bool(is_large(size, eps) & (spread <= MAX_DISTINCT * eps * size))
