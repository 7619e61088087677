"""What is wrong with single channels and samples of one batch.

Shape letters: B sample, C channel, T position within a channel.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from nanhunt.audit.data_layout import Layout, is_large, moves
from nanhunt.records.data_audit import Pair, Spot

MIN_POSITIONS = 32
"""Fewer say nothing of a channel."""

RAIL_SHARE, RAIL_COUNT, RAIL_RUN = 0.01, 8, 3
"""A channel is clipped where this share of its values, so many of them, and so many in a row, are its largest."""
HELD_SHARE = 0.25
"""A channel that keeps one value for more than this share of a sample is flat there."""
LEFT_SHARE = 0.02
"""A sample of which less is left is next to nothing but padding."""
_MIN_LEVELS = 32
_MAX_HELD = 0.2

_EQUAL = 1 - 1e-9
"""Correlation of scaled copies; rounding in single precision costs less than 1e-12."""
MAX_COMPARED = 256

_OFFSET = 1e-4
"""Rounding of the offset, relative to the deviation, beyond which an offset matters."""


def nonfinite(tensor: Tensor, batch: int) -> Iterator[Spot]:
    """Samples with non-finite values, and in them the first channel."""
    is_bad = ~torch.isfinite(tensor)
    if not is_bad.any():
        return
    if tensor.dim() < 2:
        for index in is_bad.reshape(-1).nonzero().flatten().tolist():
            yield Spot(batch, index)
        return
    rest = is_bad.flatten(1).double().mean(1)
    for sample in rest.nonzero().flatten().tolist():
        place = is_bad[sample].nonzero()[0].tolist()
        yield Spot(batch, sample, place[0] if tensor.dim() > 2 else None, share=float(rest[sample]))


def flat(layout: Layout, batch: int) -> tuple[list[Spot], list[Spot]]:
    """Constant channels of samples that are not, and samples that are constant throughout."""
    low_BC, high_BC = layout.extremes()
    is_flat_BC = ~moves(low_BC, high_BC, layout.eps) & ~layout.broken_BC
    is_flat_BC |= ~layout.valid_BT.any(1, keepdim=True)
    is_empty_B = is_flat_BC.all(1)
    empty = [Spot(batch, sample) for sample in is_empty_B.nonzero().flatten().tolist()]
    is_long_B1 = layout.num_valid_B1 >= MIN_POSITIONS
    places = (is_flat_BC & is_long_B1 & ~is_empty_B[:, None]).nonzero().tolist()
    found = [Spot(batch, sample, channel, float(low_BC[sample, channel])) for sample, channel in places]
    return found + _held(layout, batch, is_flat_BC), empty


def _held(layout: Layout, batch: int, is_flat_BC: Tensor) -> list[Spot]:
    """Channels of waveforms that keep one value for a good part of the sample and move in the rest of it.

    A stretch of 0 in all channels alike is silence, or padding, and does not count.
    """
    if not layout.is_waveform or layout.values_BCT.shape[1] < 2:
        return []
    values_BCT = layout.values_BCT
    is_silent_B1T = (values_BCT == 0).all(1, keepdim=True)
    is_same_BCT = (values_BCT[..., 1:] == values_BCT[..., :-1]) & ~is_silent_B1T[..., 1:]
    place_T = torch.arange(is_same_BCT.shape[2])
    length_BCT = place_T - torch.where(is_same_BCT, -1, place_T).cummax(2).values
    longest_BC, end_BC = length_BCT.max(2)
    candidates = (longest_BC > HELD_SHARE * layout.num_valid_B1) & ~is_flat_BC & ~layout.broken_BC
    spots = []
    for sample, channel in candidates.nonzero().tolist():
        length, value = int(longest_BC[sample, channel]), float(values_BCT[sample, channel, end_BC[sample, channel]])
        rest_T = values_BCT[sample, channel][layout.valid_BT[sample]]
        if _moves_freely(rest_T[rest_T != value]):
            spots.append(Spot(batch, sample, channel, value, length / int(layout.num_valid_B1[sample])))
    return spots


def padded(layout: Layout, batch: int) -> list[Spot]:
    """Samples of waveforms that are next to nothing but padding; ``value`` is the number of positions left."""
    if not layout.is_waveform:
        return []
    left_B = layout.num_valid_B1[:, 0]
    length = layout.valid_BT.shape[1]
    places = ((left_B > 0) & (left_B < LEFT_SHARE * length)).nonzero().flatten().tolist()
    return [Spot(batch, sample, None, float(left_B[sample]), 1 - float(left_B[sample]) / length) for sample in places]


def clipped(layout: Layout, batch: int) -> list[Spot]:
    """Channels of waveforms that stay at their largest value; a floor alone is deliberate in spectrograms."""
    if not layout.is_waveform:
        return []
    low_BC, high_BC = layout.extremes()
    at_rail_BCT = (layout.values_BCT == high_BC[..., None]) & layout.valid_BT[:, None]
    number_BC = at_rail_BCT.sum(2)
    candidates = (number_BC >= RAIL_COUNT) & (number_BC > RAIL_SHARE * layout.num_valid_B1) & (low_BC < high_BC)
    spots = []
    for sample, channel in (candidates & ~layout.broken_BC).nonzero().tolist():
        values_T = layout.values_BCT[sample, channel][layout.valid_BT[sample]]
        rail = float(high_BC[sample, channel])
        if _is_clipped(values_T, rail):
            spots.append(Spot(batch, sample, channel, rail, float((values_T == rail).double().mean())))
    return spots


def _is_clipped(values_T: Tensor, rail: float) -> bool:
    """Whether it stays at the rail and not at other values: steps and coarse steps of a converter do."""
    at_T = values_T == rail
    has_run = bool(at_T.unfold(0, RAIL_RUN, 1).all(1).any()) if len(at_T) >= RAIL_RUN else False
    return has_run and _moves_freely(values_T[~at_T & (values_T != values_T.min())])


def _moves_freely(values_T: Tensor) -> bool:
    """Whether it takes many values and seldom keeps one: not a step function, not a few levels of a converter."""
    if len(values_T) < MIN_POSITIONS or values_T.unique().numel() < _MIN_LEVELS:
        return False
    return float((values_T.diff() == 0).double().mean()) < _MAX_HELD


def with_offset(layout: Layout, batch: int) -> list[Spot]:
    """Channels whose mean is so much larger than their deviation that its rounding is felt."""
    mean_BC, std_BC = layout.moments()
    limit = max(10.0, _OFFSET / layout.eps)
    low_BC, high_BC = layout.extremes()
    # What moves by its last digits alone is a constant that was computed, unless it is too large for one.
    moves_BC = (std_BC > 8 * layout.eps * mean_BC.abs()) | is_large(mean_BC.abs(), layout.eps)
    moves_BC &= moves(low_BC, high_BC, layout.eps)
    is_far_BC = moves_BC & (mean_BC.abs() > limit * std_BC) & ~layout.broken_BC
    places = (is_far_BC & (layout.num_valid_B1 >= MIN_POSITIONS)).nonzero().tolist()
    return [
        Spot(batch, sample, channel, float(mean_BC[sample, channel] / std_BC[sample, channel]))
        for sample, channel in places
    ]


def equal_channels(layout: Layout, batch: int) -> list[Pair]:
    """Channels of a waveform that are copies of another one of the same sample, up to a factor and an offset."""
    num_channels = layout.values_BCT.shape[1]
    if not layout.is_waveform or not 2 <= num_channels <= MAX_COMPARED:
        return []
    mean_BC, std_BC = layout.moments()
    is_live_BC = (std_BC > 8 * layout.eps * mean_BC.abs()) & ~layout.broken_BC
    scale_BC = torch.where(is_live_BC, 1 / std_BC, 0.0)
    pairs = []
    for sample in range(len(std_BC)):
        valid_T = layout.valid_BT[sample]
        if int(valid_T.sum()) < MIN_POSITIONS:
            continue
        values_CT = layout.values_BCT[sample][:, valid_T]
        normal_CT = (values_CT - mean_BC[sample][:, None]) * scale_BC[sample][:, None]
        correlation_CC = (normal_CT @ normal_CT.T / values_CT.shape[1]).triu(1)
        # A chain of copies is named by its first channel: one pair for each copy.
        copies = {second: first for first, second in reversed((correlation_CC.abs() > _EQUAL).nonzero().tolist())}
        for second, first in sorted(copies.items()):
            sign = 1.0 if correlation_CC[first, second] > 0 else -1.0
            ratio = sign * float(std_BC[sample, second] / std_BC[sample, first])
            pairs.append(Pair(Spot(batch, sample, first), Spot(batch, sample, second), ratio))
    return pairs


def fingerprints(tensor: Tensor) -> list[bytes]:
    """One for each sample; equal for equal bits."""
    raw = tensor.contiguous().cpu().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in raw]
