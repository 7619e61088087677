"""One floating-point tensor over all batches.

Shape letters: B sample, C channel, F feature, N sample of any batch, T position within a channel.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanhunt.audit import data_spots as spots
from nanhunt.audit.data_layout import MAX_DISTINCT, Layout, lay_out, unlike_signals
from nanhunt.records.data_audit import ChannelScale, Pair, Spot, TensorAudit

MIN_SAMPLES = 4
"""Fewer samples, or channels, do not tell which of them is the odd one."""
MIN_ROWS = 32
CHANNEL_LIMITS = ((50.0, 6.0), (20.0, 10.0))
"""A channel is out of scale beyond both of one pair: ratio to the middle one, and robust deviations. The reference
electrode of a real recording has 24 and 13.6, its other channels, and those of another recording, at most 4 and 2.3."""
SAMPLE_LIMITS = ((1000.0, 6.0),)
_FLOOR = 0.05
"""Least spread of the logarithms, in decades: channels of nearly one size do not make an outlier of the next."""
_MAX_KEPT = 4_000_000
_MIN_COMPARED = 16


@dataclass
class TensorLook:
    """A tensor over the batches; call it with each, then ask for the ``record``."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    axis: str = ""
    num_batches: int = 0
    num_samples: int = 0
    num_channels: int = 0
    num_elements: int = 0
    num_nonfinite: int = 0
    num_subnormal: int = 0
    num_padding: int = 0
    low: float = math.inf
    high: float = -math.inf
    sums: list[tuple[int, float, float]] = field(default_factory=list)
    nonfinite: list[Spot] = field(default_factory=list)
    flat: list[Spot] = field(default_factory=list)
    empty: list[Spot] = field(default_factory=list)
    padded: list[Spot] = field(default_factory=list)
    clipped: list[Spot] = field(default_factory=list)
    offset: list[Spot] = field(default_factory=list)
    equal_samples: list[Pair] = field(default_factory=list)
    equal_channels: list[Pair] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
    is_pixels: bool = True
    channel_stds: list[Tensor] = field(default_factory=list)
    sample_stds: list[tuple[Spot, float]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    seen: dict[bytes, Spot] = field(default_factory=dict)

    def __call__(self, tensor: Tensor, batch: int) -> None:
        """Looks at the tensor of one batch."""
        self._see_whole(tensor, batch)
        layout = lay_out(tensor)
        if layout is None or tensor.dim() > 4:
            self.unjudged.append(
                "it has one number for each sample" if layout is None else "it has more than four axes"
            )
            return
        self.num_channels = layout.values_BCT.shape[1]
        self.num_padding += int((~layout.valid_BT).sum()) * self.num_channels
        reason = unlike_signals(layout)
        if reason:
            self.unjudged.append(reason)
            return
        self._see_samples(tensor, layout, batch)
        if tensor.dim() == 2:
            self.rows.append(tensor)
        else:
            self._see_channels(layout, batch)

    def _see_whole(self, tensor: Tensor, batch: int) -> None:
        self.shape = self.shape or tuple(tensor.shape)
        self.dtype = self.dtype or str(tensor.dtype).removeprefix("torch.")
        self.axis = "channel" if tensor.dim() > 2 else "feature"
        self.num_batches += 1
        self.num_samples += tensor.shape[0] if tensor.dim() else 1
        self.num_elements += tensor.numel()
        finite = tensor[torch.isfinite(tensor)]
        self.num_nonfinite += tensor.numel() - finite.numel()
        self.nonfinite += spots.nonfinite(tensor, batch)
        if not finite.numel():
            self.is_pixels = False
            return
        tiny = torch.finfo(tensor.dtype).tiny
        self.num_subnormal += int(((finite != 0) & (finite.abs() < tiny)).sum())
        low, high = float(finite.min()), float(finite.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        wide = finite.double()
        self.sums.append((finite.numel(), float(wide.sum()), float(wide.square().sum())))
        is_image = tensor.dim() == 4 and {tensor.shape[1], tensor.shape[-1]} & {1, 3, 4}
        is_whole = bool(is_image) and low >= 0 and high <= 255 and bool((finite == finite.round()).all())
        self.is_pixels = self.is_pixels and is_whole

    def _see_samples(self, tensor: Tensor, layout: Layout, batch: int) -> None:
        # One number, or a few, are no sample that could be empty or repeated.
        is_large = layout.values_BCT[0].numel() >= _MIN_COMPARED
        empty = spots.flat(layout, batch)[1] if is_large else []
        self.empty += empty
        none = {spot.sample for spot in empty}
        _, std_BC = layout.moments()
        for sample, std in enumerate(std_BC.square().mean(1).sqrt().tolist()):
            if std > 0 and sample not in none:
                self.sample_stds.append((Spot(batch, sample), std))
        if not is_large:
            return
        for sample, mark in enumerate(spots.fingerprints(tensor)):
            if sample in none:
                continue
            first = self.seen.setdefault(mark, Spot(batch, sample))
            if first != Spot(batch, sample):
                self.equal_samples.append(Pair(first, Spot(batch, sample)))

    def _see_channels(self, layout: Layout, batch: int) -> None:
        # Of an axis that may well be time, a channel that is constant is a step of nothing but padding.
        flat = spots.flat(layout, batch)[0] if layout.is_clear else []
        self.flat += flat
        self.padded += spots.padded(layout, batch)
        self.clipped += spots.clipped(layout, batch)
        self.offset += spots.with_offset(layout, batch)
        self.equal_channels += spots.equal_channels(layout, batch)
        if layout.is_waveform:
            _, std_BC = layout.moments()
            dead = {(spot.sample, spot.channel) for spot in flat if spot.share == 1.0}
            for sample, channel in dead:
                std_BC[sample, channel] = math.nan
            self.channel_stds.append(torch.where(layout.broken_BC, math.nan, std_BC))

    def record(self) -> TensorAudit:
        """What was seen of it."""
        scales = _odd_channels(self.channel_stds)
        if not self.unjudged and self.rows:
            scales = self._see_features()
        is_judged = not self.unjudged
        total = sum(number for number, _, _ in self.sums)
        mean = sum(value for _, value, _ in self.sums) / total if total else 0.0
        square = sum(value for _, _, value in self.sums) / total if total else 0.0
        return TensorAudit(
            *(self.name, self.dtype, self.shape, self.axis),
            num_batches=self.num_batches,
            num_samples=self.num_samples,
            num_channels=self.num_channels,
            low=self.low if total else 0.0,
            high=self.high if total else 0.0,
            mean=mean,
            std=math.sqrt(max(square - mean * mean, 0.0)),
            padding_share=self.num_padding / max(self.num_elements, 1),
            num_nonfinite=self.num_nonfinite,
            num_subnormal=self.num_subnormal,
            num_elements=self.num_elements,
            nonfinite=tuple(self.nonfinite),
            flat=tuple(self.flat) if is_judged else (),
            empty=tuple(self.empty) if is_judged else (),
            padded=tuple(self.padded) if is_judged else (),
            clipped=tuple(self.clipped) if is_judged else (),
            offset=tuple(self.offset) if is_judged else (),
            equal_samples=tuple(self.equal_samples) if is_judged else (),
            equal_channels=tuple(self.equal_channels) if is_judged else (),
            channels_out_of_scale=scales if is_judged else (),
            samples_out_of_scale=_odd_samples(self.sample_stds) if is_judged else (),
            is_pixels=self.is_pixels and self.high > 128,
            unjudged=self.unjudged[0] if self.unjudged else "",
        )

    def _see_features(self) -> tuple[ChannelScale, ...]:
        """The columns of a matrix of samples and features, over all batches."""
        widths = {rows.shape[1] for rows in self.rows}
        number = sum(len(rows) for rows in self.rows)
        if len(widths) > 1 or number < MIN_ROWS or number * max(widths) > _MAX_KEPT:
            return ()
        rows_NF = torch.cat(self.rows).double()
        values_1FN = torch.where(torch.isfinite(rows_NF), rows_NF, 0.0).T[None]
        broken_1F = ~torch.isfinite(rows_NF).all(0)[None]
        whole_1N = torch.ones(1, number, dtype=torch.bool)
        features = Layout(values_1FN, whole_1N, broken_1F, False, True, torch.finfo(self.rows[0].dtype).eps)
        self.flat = [spot for spot in spots.flat(features, 0)[0] if spot.value != 0.0]
        self.offset = spots.with_offset(features, 0)
        _, std_1F = features.moments()
        scales = _odd_channels([torch.where(std_1F > 0, std_1F, math.nan)])
        # A rare yes or no has a small deviation, and is no measurement.
        return tuple(one for one in scales if rows_NF[:, one.channel].unique().numel() > MAX_DISTINCT)


def _odd_channels(stds: Sequence[Tensor]) -> tuple[ChannelScale, ...]:
    """Channels far from the others, by the middle deviation of their samples."""
    if not stds or len({part.shape[1] for part in stds}) > 1:
        return ()
    middle_C = torch.cat(list(stds)).nanmedian(0).values
    known = [(channel, std) for channel, std in enumerate(middle_C.tolist()) if std > 0]
    found = []
    for (channel, std), (ratio, deviations) in zip(known, _distances([std for _, std in known]), strict=True):
        if _is_beyond(CHANNEL_LIMITS, ratio, deviations):
            found.append(ChannelScale(channel, std, ratio, deviations))
    return tuple(found)


def _odd_samples(stds: Sequence[tuple[Spot, float]]) -> tuple[Spot, ...]:
    """Samples far from the others; ``value`` is the ratio."""
    found = []
    for (spot, _), (ratio, deviations) in zip(stds, _distances([std for _, std in stds]), strict=True):
        if _is_beyond(SAMPLE_LIMITS, ratio, deviations):
            found.append(Spot(spot.batch, spot.sample, None, ratio))
    return tuple(found)


def _is_beyond(limits: Sequence[tuple[float, float]], ratio: float, deviations: float) -> bool:
    return any(max(ratio, 1 / ratio) > factor and deviations > spread for factor, spread in limits)


def _distances(values: Sequence[float]) -> list[tuple[float, float]]:
    """For each its ratio to the middle one, and how many robust deviations its logarithm is away."""
    if len(values) < MIN_SAMPLES:
        return [(1.0, 0.0)] * len(values)
    logs = [math.log10(value) for value in values]
    middle = statistics.median(logs)
    # 1.4826 makes the median absolute deviation that of a normal distribution.
    spread = max(1.4826 * statistics.median(abs(log - middle) for log in logs), _FLOOR)
    return [(10 ** (log - middle), abs(log - middle) / spread) for log in logs]
