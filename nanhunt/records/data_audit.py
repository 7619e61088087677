"""What an audit of batches saw: the samples and channels of each tensor, and the labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spot:
    """One channel of one sample, or a whole sample.

    Attributes:
        batch: Number of the batch.
        sample: Number of the sample in it.
        channel: Number of the channel; None for the whole sample.
        value: What was seen there: the constant of a flat channel, the rail of a clipped one, a ratio.
        share: Share of the elements concerned.
    """

    batch: int
    sample: int
    channel: int | None = None
    value: float = 0.0
    share: float = 1.0

    @property
    def text(self) -> str:
        """``sample 3``, or ``sample 3 of batch 2`` beyond the first batch."""
        where = f"sample {self.sample}"
        return f"{where} of batch {self.batch}" if self.batch else where


@dataclass(frozen=True)
class Pair:
    """Two that are the same: samples, or channels of one sample.

    Attributes:
        first: One.
        second: The other, later one.
        ratio: Second over first.
    """

    first: Spot
    second: Spot
    ratio: float = 1.0


@dataclass(frozen=True)
class ChannelScale:
    """A channel and how large it is beside the others.

    Attributes:
        channel: Its number.
        std: Its standard deviation, the middle one of the samples.
        ratio: That over the middle one of all channels.
        deviations: How far the logarithm is from that of the others, in robust standard deviations.
    """

    channel: int
    std: float
    ratio: float
    deviations: float


@dataclass(frozen=True)
class TensorAudit:
    """One floating-point tensor of the batches.

    Attributes:
        name: Its place in the batch, such as ``windows``.
        dtype: Element type.
        shape: In the first batch.
        axis: What its columns are called: ``channel`` or ``feature``; empty where it has none.
        num_batches: Batches it was seen in.
        num_samples: Samples seen.
        num_channels: Channels of each.
        low: Smallest finite value.
        high: Largest finite value.
        mean: Of the finite values.
        std: Of the finite values.
        padding_share: Share of elements in runs of zeros at an end of a sample, the same for all channels.
        num_nonfinite: NaN and infinite elements.
        num_subnormal: Subnormal elements.
        num_elements: All.
        nonfinite: Where non-finite elements are.
        flat: Channels that are constant in a sample that is not.
        empty: Samples that are constant throughout.
        padded: Samples that are next to nothing but padding; ``value`` is the number of positions left.
        clipped: Channels that stay at their extreme value.
        offset: Channels whose mean is far larger than their deviation; ``value`` is the ratio.
        equal_samples: Samples that are the same, bit for bit.
        equal_channels: Channels of a sample that are the same, up to a factor.
        channels_out_of_scale: Channels far larger or smaller than the others.
        samples_out_of_scale: Samples far larger or smaller than the others; ``value`` is the ratio.
        is_pixels: Whether it holds whole numbers from 0 to 255 in the shape of images.
        unjudged: Why only non-finite values were looked for; empty where everything was.
    """

    name: str
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    axis: str = "channel"
    num_batches: int = 1
    num_samples: int = 0
    num_channels: int = 0
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    padding_share: float = 0.0
    num_nonfinite: int = 0
    num_subnormal: int = 0
    num_elements: int = 0
    nonfinite: tuple[Spot, ...] = ()
    flat: tuple[Spot, ...] = ()
    empty: tuple[Spot, ...] = ()
    padded: tuple[Spot, ...] = ()
    clipped: tuple[Spot, ...] = ()
    offset: tuple[Spot, ...] = ()
    equal_samples: tuple[Pair, ...] = ()
    equal_channels: tuple[Pair, ...] = ()
    channels_out_of_scale: tuple[ChannelScale, ...] = ()
    samples_out_of_scale: tuple[Spot, ...] = ()
    is_pixels: bool = False
    unjudged: str = ""


@dataclass(frozen=True)
class LabelAudit:
    """The labels of the batches.

    Attributes:
        name: Their place in the batch.
        dtype: Element type.
        shape: In the first batch.
        num_samples: Samples seen.
        num_labels: Elements, without those that are to be ignored.
        num_ignored: Elements equal to -100, torch's ``ignore_index``.
        num_nonfinite: NaN and infinite elements.
        counts: Elements of each class; empty for labels that are no classes.
        num_distributions: Rows that sum to 1, of labels that are distributions over classes.
        num_rows: Rows of these.
        sums: Smallest and largest sum of a row.
        all_ignored: Batches in which every label is ignored.
    """

    name: str
    dtype: str = "int64"
    shape: tuple[int, ...] = ()
    num_samples: int = 0
    num_labels: int = 0
    num_ignored: int = 0
    num_nonfinite: int = 0
    counts: Mapping[int, int] = field(default_factory=dict)
    num_distributions: int = 0
    num_rows: int = 0
    sums: tuple[float, float] = (1.0, 1.0)
    all_ignored: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataAudit:
    """The batches that were looked at.

    Attributes:
        num_batches: Batches.
        tensors: Floating-point tensors that are no labels.
        labels: None where nothing says which tensor they are.
        has_lengths: Whether a tensor of whole or truth numbers may say how long samples are, as masks and lengths do.
    """

    num_batches: int
    tensors: tuple[TensorAudit, ...] = ()
    labels: LabelAudit | None = None
    has_lengths: bool = False


def places(spots: tuple[Spot, ...], limit: int = 4) -> str:
    """Where: ``channel 13 in samples 1, 2``, the first few; channels of the same samples together."""
    by_channel: dict[int | None, list[str]] = {}
    for spot in sorted(spots, key=lambda spot: (spot.batch, spot.sample)):
        by_channel.setdefault(spot.channel, []).append(_sample(spot))
    by_samples: dict[str, list[int | None]] = {}
    for channel, found in by_channel.items():
        word = "sample" if len(found) == 1 else "samples"
        by_samples.setdefault(f"{word} {first_few(found, limit)}", []).append(channel)
    parts = [
        samples if channels == [None] else f"{first_few(channels, limit)} in {samples}"
        for samples, channels in by_samples.items()
    ]
    return first_few(parts, limit, "; ")


def first_few(items: Sequence[object], limit: int, joint: str = ", ") -> str:
    """The first items, and dots for the others."""
    return joint.join([*map(str, items[:limit]), *(["..."] if len(items) > limit else [])])


def _sample(spot: Spot) -> str:
    details = [f"batch {spot.batch}"] if spot.batch else []
    details += [f"{spot.share:.0%} of it"] if spot.share < 1 else []
    return f"{spot.sample} ({', '.join(details)})" if details else str(spot.sample)
