"""Recordings cut into windows of one length, and batches of them.

Shape letters: N window, B batch, C channel, L sample within a window, T time sample of a recording.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detector.config import FS_HZ, TrainConfig
from detector.recording import CHANNELS, Recording, RecordingError, span_note, split_note
from detector.synthetic import synthesize_recording

Batch = dict[str, Any]
"""``windows`` (B, 19, L) float32 in standard deviations, ``labels`` (B, L) float32 of 0 and 1, ``sources`` list[str].

A source names the recording, the span of the window and what is remarkable in it:
``synthetic-0003 20.0-30.0 s: flat T3 T5``.
"""

WINDOW_MULTIPLE = 16
"""A window is a whole number of the model's time steps, each 16 samples long."""

POOL_SIZE = 8
"""Synthetic recordings held at once; after a pass over their windows the oldest makes room for the next."""

_SEIZURE_SHARE = 1 / 3
_FLAT_PEAK_TO_PEAK = 4 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Window:
    """One window: (19, L) float32 samples, (L,) float32 labels, and where it comes from."""

    samples_CL: NDArray[np.float32]
    labels_L: NDArray[np.float32]
    source: str


def synthetic_batches(config: TrainConfig) -> Iterator[Batch]:
    """Batches of synthetic windows without end, the same for the same seed.

    Recordings of two to three minutes are drawn one after another into a pool. A pass takes the windows of the pool in
    random order, as many without a seizure as keep those with one at about a third.

    Raises:
        ValueError: If the window is not a positive multiple of ``WINDOW_MULTIPLE`` samples.
    """
    return _batches(_synthetic_windows(config.seed, window_samples(config)), config.batch_size)


def recording_batches(recordings: Iterable[Recording], config: TrainConfig) -> Iterator[Batch]:
    """Batches of the windows of recordings without end, in an order that ``config.seed`` draws anew for each pass.

    Raises:
        ValueError: If there are no recordings, or the window is not a positive multiple of ``WINDOW_MULTIPLE`` samples.
        RecordingError: If a recording has non-finite samples or another rate than 256 Hz.
    """
    length = window_samples(config)
    windows = [window for recording in recordings for window in recording_windows(recording, length)]
    if not windows:
        raise ValueError("no recordings to draw batches from")
    return _batches(_shuffled_passes(windows, config.seed), config.batch_size)


def window_samples(config: TrainConfig) -> int:
    """Samples in a window of ``config.window_s``.

    Raises:
        ValueError: If that is not a positive multiple of ``WINDOW_MULTIPLE``.
    """
    length = config.window_s * FS_HZ
    if not (length > 0 and length % WINDOW_MULTIPLE == 0):
        raise ValueError(f"window is {length:g} samples; expected a positive multiple of {WINDOW_MULTIPLE}")
    return int(length)


def standardize(recording: Recording) -> NDArray[np.float32]:
    """Each channel with mean 0 and standard deviation 1 over the recording; a flat channel becomes exactly 0.

    Nothing is clamped: an artefact of fifty standard deviations reaches the model as one.

    Returns:
        (19, T) float32, in standard deviations of the channel.

    Raises:
        RecordingError: If a sample is non-finite.

    Numerics:
        A constant channel has a standard deviation of 0, or of rounding errors, and dividing by either would give NaN
        or noise of unit size. Where the peak-to-peak value is no more than four float32 roundings of the largest sample
        there is no signal, and the channel is set to 0. An epsilon in the denominator would do the same to a constant
        channel but also shrink quiet ones, by an amount that depends on their unit. Moments are float64.
    """
    samples_CT = recording.samples_CT
    is_finite_C = np.isfinite(samples_CT).all(axis=1)
    if not is_finite_C.all():
        names = " ".join(np.array(CHANNELS)[~is_finite_C])
        raise RecordingError(f"{recording.name} has non-finite samples in {names}")
    peak_to_peak_C1 = np.ptp(samples_CT, axis=1, keepdims=True)
    is_flat_C1 = peak_to_peak_C1 <= _FLAT_PEAK_TO_PEAK * np.abs(samples_CT).max(axis=1, keepdims=True)
    mean_C1 = samples_CT.mean(axis=1, keepdims=True, dtype=np.float64)
    std_C1 = samples_CT.std(axis=1, keepdims=True, dtype=np.float64)
    standardized_CT = (samples_CT - mean_C1) / np.where(is_flat_C1, 1.0, std_C1)
    return np.where(is_flat_C1, 0.0, standardized_CT).astype(np.float32)


def cut_windows(
    samples_CT: NDArray[np.float32], labels_T: NDArray[np.bool_] | None, window_samples: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Consecutive windows that do not overlap; the last is padded with zeros, labels too, and nothing is dropped.

    Args:
        samples_CT: (C, T) with T >= 1.
        labels_T: (T,) bool; None is background.
        window_samples: L, a positive multiple of ``WINDOW_MULTIPLE``.

    Returns:
        Samples (N, C, L) float32 and labels (N, L) float32 of 0 and 1, with N = ceil(T / L).

    Raises:
        ValueError: If L is not a positive multiple of ``WINDOW_MULTIPLE``, or there are no samples.
    """
    num_channels, num_samples = samples_CT.shape
    if window_samples <= 0 or window_samples % WINDOW_MULTIPLE or num_samples == 0:
        raise ValueError(
            f"cannot cut {num_samples} samples into windows of {window_samples};"
            f" expected samples and a positive multiple of {WINDOW_MULTIPLE}"
        )
    num_windows = -(-num_samples // window_samples)
    padded_CT = np.zeros((num_channels, num_windows * window_samples), dtype=np.float32)
    padded_CT[:, :num_samples] = samples_CT
    padded_labels_T = np.zeros(num_windows * window_samples, dtype=np.float32)
    if labels_T is not None:
        padded_labels_T[:num_samples] = labels_T
    windows_NCL = padded_CT.reshape(num_channels, num_windows, window_samples).swapaxes(0, 1)
    return windows_NCL, padded_labels_T.reshape(num_windows, window_samples)


def recording_windows(recording: Recording, window_samples: int) -> list[Window]:
    """The standardized recording in windows, each with its source.

    Raises:
        RecordingError: If the recording has non-finite samples or another rate than 256 Hz.
    """
    if recording.fs_hz != FS_HZ:
        raise RecordingError(f"{recording.name} is sampled at {recording.fs_hz:g} Hz; expected {FS_HZ:g} Hz")
    windows_NCL, labels_NL = cut_windows(standardize(recording), recording.labels_T, window_samples)
    return [
        Window(samples_CL, labels_L, _source(recording, index, window_samples))
        for index, (samples_CL, labels_L) in enumerate(zip(windows_NCL, labels_NL, strict=True))
    ]


def _source(recording: Recording, index: int, window_samples: int) -> str:
    """The recording, the span of the window, and the remarks that hold inside it."""
    window_s = window_samples / FS_HZ
    start_s = index * window_s
    end_s = min(start_s + window_s, recording.duration_s)
    remarks = [note for note in (_clip_note(note, start_s, end_s) for note in recording.notes) if note]
    # To a sample: rounding errors of the subtraction are no tail.
    padded_s = round((start_s + window_s - end_s) * FS_HZ) / FS_HZ
    if padded_s:
        remarks.append(f"zero-padded tail {padded_s:.1f} s")
    return ": ".join(filter(None, [span_note(recording.name, (start_s, end_s)), "; ".join(remarks)]))


def _clip_note(note: str, start_s: float, end_s: float) -> str | None:
    """A remark as it holds in the window: without its span if that is the whole window, None if it is outside."""
    what, span_s = split_note(note)
    if span_s is None or span_s[0] >= end_s or span_s[1] <= start_s:
        return None
    clipped_s = max(span_s[0], start_s), min(span_s[1], end_s)
    return what if clipped_s == (start_s, end_s) else span_note(what, clipped_s)


def _synthetic_windows(seed: int, length: int) -> Iterator[Window]:
    """Windows of a pool of synthetic recordings that is renewed one recording a pass."""
    rng = np.random.default_rng([seed, POOL_SIZE])
    recordings = (_stream_recording(seed, index, length) for index in itertools.count())
    pool = deque((recording_windows(r, length) for r in itertools.islice(recordings, POOL_SIZE)), maxlen=POOL_SIZE)
    while True:
        windows = list(itertools.chain.from_iterable(pool))
        has_seizure_N = np.array([window.labels_L.any() for window in windows])
        chosen = _balance(rng, has_seizure_N)
        yield from (windows[index] for index in chosen)
        pool.append(recording_windows(next(recordings), length))


def _stream_recording(seed: int, index: int, length: int) -> Recording:
    """The recording at a place of the stream, never a whole number of windows long."""
    recording_seed = 100_000 * seed + index
    duration_s = np.random.default_rng([recording_seed, 1]).integers(1200, 1801) / 10.0
    if round(duration_s * FS_HZ) % length == 0:
        duration_s += 0.1
    return synthesize_recording(seed=recording_seed, duration_s=float(duration_s))


def _balance(rng: np.random.Generator, has_seizure_N: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Windows in random order, the more frequent kind thinned out until a third of them have a seizure."""
    with_seizure, without = np.flatnonzero(has_seizure_N), np.flatnonzero(~has_seizure_N)
    if len(with_seizure) and len(without):
        num_with = min(len(with_seizure), round(len(without) * _SEIZURE_SHARE / (1 - _SEIZURE_SHARE)) or 1)
        num_without = min(len(without), round(num_with * (1 - _SEIZURE_SHARE) / _SEIZURE_SHARE))
        with_seizure = rng.choice(with_seizure, num_with, replace=False)
        without = rng.choice(without, num_without, replace=False)
    return rng.permutation(np.concatenate([with_seizure, without]))


def _shuffled_passes(windows: Sequence[Window], seed: int) -> Iterator[Window]:
    """All windows, again and again, each time in another order."""
    rng = np.random.default_rng([seed, 0])
    while True:
        yield from (windows[index] for index in rng.permutation(len(windows)))


def _batches(windows: Iterator[Window], batch_size: int) -> Iterator[Batch]:
    """Batches from a stream of windows; each owns its memory."""
    while True:
        batch = list(itertools.islice(windows, batch_size))
        yield {
            "windows": torch.from_numpy(np.stack([window.samples_CL for window in batch])),
            "labels": torch.from_numpy(np.stack([window.labels_L for window in batch])),
            "sources": [window.source for window in batch],
        }
