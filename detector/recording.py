"""A recording of nineteen electrodes, whatever it came from, and the names of those electrodes.

Shape letters: C channel, T time sample.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanhunt.errors import NanhuntError

CHANNELS = (
    "Fp1", "F3", "C3", "P3", "F7", "T3", "T5", "O1", "Fz", "Cz", "Pz", "Fp2", "F4", "C4", "P4", "F8", "T4", "T6", "O2",
)  # fmt: skip
"""The electrodes of the 10-20 system in the order of the model's channels."""

SYNONYMS = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
"""Names of the 10-10 system for four of these electrodes."""

FLAT_S = 1.0
"""Shortest run of one repeated value that counts as flat, in s; a quiet channel repeats a value for far less."""

_SPELLING = {name.upper(): name for name in CHANNELS} | SYNONYMS
_REFERENCE = re.compile(r"-(LE|REF|AR)$")
_SPAN = re.compile(r"^(?P<what>.*) (?P<start>\d+\.\d)-(?P<end>\d+\.\d) s$")

Span = tuple[float, float]
"""Start and end in s from the beginning of the recording."""


class RecordingError(NanhuntError):
    """A recording cannot be read, or its samples cannot be believed."""


@dataclass(frozen=True)
class Recording:
    """Nineteen channels of EEG and what is known about them.

    Attributes:
        name: What a person calls it; a file's stem.
        samples_CT: (19, T) float32, in µV, channels as in ``CHANNELS``.
        fs_hz: Sampling rate, in Hz.
        labels_T: (T,) bool, True during a seizure; None where nobody has marked any, which trains as background.
        notes: One remark each. A remark that ends in a span, as ``flat T3 T5 12.0-31.5 s``, holds there only.
    """

    name: str
    samples_CT: NDArray[np.float32]
    fs_hz: float
    labels_T: NDArray[np.bool_] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.samples_CT.ndim != 2 or len(self.samples_CT) != len(CHANNELS) or self.samples_CT.shape[1] == 0:
            raise ValueError(f"samples have shape {self.samples_CT.shape}; expected ({len(CHANNELS)}, T) with T >= 1")
        if self.samples_CT.dtype != np.float32:
            raise ValueError(f"samples are {self.samples_CT.dtype}; expected float32")
        if self.labels_T is None:
            return
        if self.labels_T.shape != self.samples_CT.shape[1:] or self.labels_T.dtype != np.bool_:
            raise ValueError(
                f"labels are {self.labels_T.dtype} {self.labels_T.shape}; expected bool {self.samples_CT.shape[1:]}"
            )

    @property
    def duration_s(self) -> float:
        """Length in s."""
        return self.samples_CT.shape[1] / self.fs_hz


def clean_channel_name(label: str) -> str:
    """The electrode's name as ``CHANNELS`` spells it, or the bare label in upper case where it is none of them.

    Blanks, dots, a leading ``EEG`` and a trailing ``-LE``, ``-REF`` or ``-AR`` are dropped, case is ignored and
    ``SYNONYMS`` are applied: ``EEG T7-REF`` is ``T3``. A bipolar lead such as ``T7-P7`` stays what it is.
    """
    bare = re.sub(r"[\s.]", "", label).upper().removeprefix("EEG")
    bare = _REFERENCE.sub("", bare)
    return _SPELLING.get(bare, bare)


def span_note(what: str, span_s: Span) -> str:
    """A remark that holds for a span: ``what``, start and end in s to a tenth."""
    return f"{what} {span_s[0]:.1f}-{span_s[1]:.1f} s"


def split_note(note: str) -> tuple[str, Span | None]:
    """A remark and the span it holds for, None where it is about the whole recording."""
    match = _SPAN.match(note)
    if match is None:
        return note, None
    return match["what"], (float(match["start"]), float(match["end"]))


def flat_runs(samples_T: NDArray[np.floating], *, min_samples: int) -> list[tuple[int, int]]:
    """Where one value is repeated exactly ``min_samples`` times or more, as first and past-the-end sample."""
    changes = np.flatnonzero(samples_T[1:] != samples_T[:-1]) + 1
    starts = np.concatenate(([0], changes))
    ends = np.concatenate((changes, [len(samples_T)]))
    is_long = ends - starts >= max(min_samples, 1)
    return list(zip(starts[is_long].tolist(), ends[is_long].tolist(), strict=True))


def flat_notes(spans_by_channel: Mapping[str, Sequence[Span]]) -> list[str]:
    """One remark per flat span, with the channels that share it, in the order of time."""
    channels_by_span: dict[Span, list[str]] = {}
    for channel, spans in spans_by_channel.items():
        for span in spans:
            channels_by_span.setdefault(span, []).append(channel)
    return [flat_note(channels, span) for span, channels in sorted(channels_by_span.items())]


def flat_note(channels: Sequence[str], span_s: Span) -> str:
    """The remark for channels that are flat together."""
    what = "all channels flat" if len(channels) == len(CHANNELS) else f"flat {' '.join(channels)}"
    return span_note(what, span_s)
