"""EDF and EDF+ files read as recordings, or refused with the reason.

A reader that meets a damaged file often returns numbers all the same: bytes that went through a text editor, a header
whose calibration is missing, volts taken for microvolts. Training on such numbers fails late and far from the cause, so
everything here that cannot be believed is refused, and everything odd that can be is kept as a note of the recording.
"""

import math
import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import edfio
import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from detector.config import FS_HZ
from detector.recording import (
    CHANNELS,
    FLAT_S,
    Recording,
    RecordingError,
    Span,
    clean_channel_name,
    flat_notes,
    flat_runs,
    span_note,
)

MAX_STD_UV = 500.0
"""A channel with a larger standard deviation is not EEG in µV; scalp EEG with artefacts stays below 200."""

NEARLY_FLAT_STD_UV = 0.5
"""A channel with a smaller standard deviation gets a note: a reference electrode, or a wrong unit."""

MIN_FS_HZ, MAX_FS_HZ = 64.0, 100_000.0
"""Rates that can be EEG: a slower channel holds a trend, for seizure rhythms reach 30 Hz; no amplifier is faster."""

_UV_PER_UNIT = {"v": 1e6, "mv": 1e3, "uv": 1.0, "µv": 1.0, "μv": 1.0, "": 1.0}
_SEIZURE = re.compile(r"\bseiz|\bsz\b", re.IGNORECASE)
_COPY_AGAIN = "copy the file again in binary mode"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def read_edf(path: str | Path) -> Recording:
    """The nineteen electrodes of an EDF or EDF+ file, in µV at 256 Hz.

    Channels are found by ``clean_channel_name``; other signals are ignored, a missing electrode is never made up.
    Labels are the annotations with a duration whose text has a word that begins with "seiz" or is "sz", in any case and
    whatever else the text says; without any the labels are None and a note says so. Notes also carry what edfio warns
    about, flat stretches of ``FLAT_S`` and more, and nearly flat channels.

    Args:
        path: The file; its stem becomes the name of the recording.

    Returns:
        (19, T) float32 in µV at 256 Hz. Stretches that are constant in the file are constant here too.

    Raises:
        RecordingError: If the file is not EDF, damaged, discontinuous, lacks an electrode, has a unit that is not a
            voltage, no calibration, or a rate or amplitude that is not EEG.

    Numerics:
        ``resample_poly`` with its default Kaiser filter: sines of 3, 10 and 40 Hz from 128 to 512 Hz come out within
        2e-3 of their amplitude, see ``tests/detector/test_edf.py``. Within a tenth of a second of the ends the filter
        reaches into a mirror image, where 10 Hz can be a tenth off and faster rhythms more. No other filter is applied.
    """
    path = Path(path)
    _check_bytes(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edf = _open(path)
        signals = _pick_signals(edf.signals, path)
        channels = [_read_channel(signal, name, edf, path) for name, signal in zip(CHANNELS, signals, strict=True)]
        annotations = _read_annotations(edf, path)
    num_samples = min(len(samples_T) for samples_T, _ in channels)
    samples_CT = np.stack([samples_T[:num_samples] for samples_T, _ in channels])
    labels_T, label_notes = _seizure_labels(annotations, num_samples)
    notes = [*dict.fromkeys(f"edfio: {warning.message}" for warning in caught)]
    notes += _amplitude_notes(samples_CT, [spans for _, spans in channels])
    return Recording(path.stem, samples_CT, FS_HZ, labels_T, (*notes, *label_notes))


def _check_bytes(path: Path) -> None:
    """Refuse bytes that cannot be those of an undamaged EDF file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) < 512 or raw[:8].strip() != b"0":
        raise RecordingError(f"{path} is not an EDF file: {len(raw)} bytes that begin with {raw[:8]!r}")
    # A few of these occur by chance in a large file; text tools leave one for every byte they did not know.
    if raw.count(_REPLACEMENT) * 1000 > len(raw):
        raise RecordingError(f"{path} was converted as if it were UTF-8 text; its samples are lost", help=_COPY_AGAIN)
    num_crlf = raw.count(b"\r\n")
    if num_crlf >= 8 and num_crlf == raw.count(b"\n"):
        raise RecordingError(f"{path} had its line ends converted to CRLF; its samples have moved", help=_COPY_AGAIN)
    _check_length(raw, path)


def _check_length(raw: bytes, path: Path) -> None:
    """Refuse a file whose length is not what its header says; edfio would read it at the wrong offset or cut it."""
    try:
        header_bytes, num_records, record_s = int(raw[184:192]), int(raw[236:244]), float(raw[244:252])
        num_signals = int(raw[252:256])
        counts = raw[256 + 216 * num_signals : 256 + 224 * num_signals]
        record_bytes = 2 * sum(int(counts[start : start + 8]) for start in range(0, len(counts), 8))
    except ValueError as error:
        raise RecordingError(f"{path} has an EDF header that cannot be read: {_one_line(error)}") from error
    if header_bytes != 256 * (num_signals + 1) or not record_s > 0 or record_bytes <= 0:
        raise RecordingError(
            f"{path} has a header of {header_bytes} bytes for {num_signals} signals"
            f" and records of {record_bytes} bytes, {record_s:g} s; that is no EDF layout"
        )
    # -1 is what a recorder writes until it is stopped properly; the length of the file is all there is to go by.
    body_bytes = len(raw) - header_bytes
    if num_records != -1 and num_records * record_bytes != body_bytes:
        raise RecordingError(
            f"{path} holds {body_bytes / record_bytes:g} data records, its header promises {num_records}",
            help="the file is truncated or damaged; copy it again",
        )


def _open(path: Path) -> edfio.Edf:
    """The file as edfio parses it, refused if it has gaps: samples after a gap would stand at the wrong time."""
    try:
        edf = edfio.read_edf(path, header_encoding="latin-1")
        has_gaps = edf.reserved.startswith("EDF+D") and not edf.is_continuous
    # edfio parses untrusted bytes and documents no exceptions; whatever a damaged header raises means the same here.
    except Exception as error:
        raise RecordingError(f"{path} cannot be read as EDF: {_one_line(error)}") from error
    if has_gaps:
        raise RecordingError(f"{path} is discontinuous (EDF+D)", help="export each continuous part to its own file")
    return edf


def _pick_signals(signals: Sequence[edfio.EdfSignal], path: Path) -> list[edfio.EdfSignal]:
    """The signal of each electrode, in the order of ``CHANNELS``."""
    found: dict[str, edfio.EdfSignal] = {}
    for signal in signals:
        name = clean_channel_name(signal.label)
        if name in CHANNELS and name in found:
            raise RecordingError(f"{path} has two signals for {name}: {found[name].label!r} and {signal.label!r}")
        found[name] = signal
    missing = [name for name in CHANNELS if name not in found]
    if missing:
        labels = ", ".join(repr(signal.label) for signal in signals[:30])
        raise RecordingError(
            f"{path} lacks {len(missing)} of {len(CHANNELS)} electrodes: {' '.join(missing)}",
            help=f"referential channels with 10-20 names are needed; the file has {labels}",
        )
    return [found[name] for name in CHANNELS]


def _read_channel(
    signal: edfio.EdfSignal, name: str, edf: edfio.Edf, path: Path
) -> tuple[NDArray[np.float32], list[Span]]:
    """A channel in µV at 256 Hz, and where it is flat, in s."""
    scale = _check_calibration(signal, name, path)
    samples_T = signal.data * scale
    if samples_T.size == 0:
        raise RecordingError(f"{path} has no samples")
    # Before the resampling filter, which would spread one non-finite value over its neighbours.
    with np.errstate(over="ignore"):
        std_uv = float(samples_T.std())
    if not np.isfinite(samples_T).all() or not std_uv <= MAX_STD_UV:
        raise RecordingError(
            f"{path} has a standard deviation of {std_uv:.4g} µV in {name}; EEG stays below {MAX_STD_UV:g} µV",
            help="the samples are damaged, or their unit or calibration is wrong",
        )
    rate = Fraction(signal.samples_per_data_record) / Fraction(str(edf.data_record_duration))
    if not MIN_FS_HZ <= rate <= MAX_FS_HZ:
        raise RecordingError(
            f"{path} has {name} at {float(rate):g} Hz; EEG is sampled at {MIN_FS_HZ:g} to {MAX_FS_HZ:g} Hz"
        )
    runs = flat_runs(samples_T, min_samples=round(FLAT_S * float(rate)))
    spans = [(round(start / float(rate), 1), round(end / float(rate), 1)) for start, end in runs]
    return _resample(samples_T, rate, runs).astype(np.float32), spans


def _check_calibration(signal: edfio.EdfSignal, name: str, path: Path) -> float:
    """The factor from the signal's unit to µV, or an error where its header does not calibrate it."""
    # A header in UTF-8 shows as two Latin-1 characters here.
    unit = signal.physical_dimension.replace("\N{LATIN CAPITAL LETTER A WITH CIRCUMFLEX}µ", "µ").strip()
    if unit.lower() not in _UV_PER_UNIT:
        raise RecordingError(f"{path} has {name} in {unit!r}; EEG is in V, mV or uV")
    try:
        physical, digital = signal.physical_range, signal.digital_range
    except ValueError as error:
        raise RecordingError(f"{path} has no calibration for {name}: {_one_line(error)}") from error
    if not np.isfinite(physical).all() or physical.min == physical.max or digital.min >= digital.max:
        raise RecordingError(
            f"{path} has no calibration for {name}: physical {physical.min:g} to {physical.max:g},"
            f" digital {digital.min} to {digital.max}"
        )
    return _UV_PER_UNIT[unit.lower()]


def _resample(samples_T: NDArray[np.float64], rate: Fraction, runs: list[tuple[int, int]]) -> NDArray[np.float64]:
    """The samples at 256 Hz, constant wherever they were constant before."""
    ratio = (Fraction(FS_HZ) / rate).limit_denominator(10_000)
    if ratio == 1:
        return samples_T
    # The filter reaches ten samples of the lower rate beyond the ends; zeros there would be a step, a mirror is none.
    num_periods = math.ceil(10 / min(ratio.denominator, ratio.numerator))
    mirrored_T = np.pad(samples_T, num_periods * ratio.denominator, mode="reflect", reflect_type="odd")
    # The median is taken away before and put back after: the filter passes a constant with a ripple of about 1e-3.
    padded_T = resample_poly(mirrored_T, ratio.numerator, ratio.denominator, padtype="median")
    resampled_T = padded_T[num_periods * ratio.numerator : -num_periods * ratio.numerator]
    for start, end in runs:
        resampled_T[math.ceil(start * ratio) : math.floor((end - 1) * ratio) + 1] = samples_T[start]
    return resampled_T


def _amplitude_notes(samples_CT: NDArray[np.float32], spans_C: list[list[Span]]) -> list[str]:
    """Remarks on flat stretches and on channels that hold next to nothing."""
    std_C = samples_CT.std(axis=1, dtype=np.float64)
    whole = (0.0, samples_CT.shape[1] / FS_HZ)
    notes = flat_notes(dict(zip(CHANNELS, spans_C, strict=True)))
    return notes + [
        span_note(f"nearly flat {name} (standard deviation {std:.2g} µV)", whole)
        for name, std in zip(CHANNELS, std_C, strict=True)
        if 0.0 < std < NEARLY_FLAT_STD_UV
    ]


def _read_annotations(edf: edfio.Edf, path: Path) -> Sequence[edfio.EdfAnnotation]:
    """The annotations; a file whose annotations cannot be read is refused, for its seizures would go unlabelled."""
    try:
        return edf.annotations
    except Exception as error:
        raise RecordingError(
            f"{path} has annotations that cannot be read: {_one_line(error)}",
            help="the file is damaged, or its annotations are not UTF-8 as EDF+ asks",
        ) from error


def _seizure_labels(
    annotations: Sequence[edfio.EdfAnnotation], num_samples: int
) -> tuple[NDArray[np.bool_] | None, list[str]]:
    """Labels from the annotations that mark seizures, None without any, and remarks on what was taken."""
    marked = [annotation for annotation in annotations if _SEIZURE.search(annotation.text)]
    notes: list[str] = []
    labels_T = np.zeros(num_samples, dtype=np.bool_)
    duration_s = num_samples / FS_HZ
    for annotation in marked:
        start_s = min(max(annotation.onset, 0.0), duration_s)
        end_s = min(max(annotation.onset + (annotation.duration or 0.0), 0.0), duration_s)
        labels_T[round(start_s * FS_HZ) : round(end_s * FS_HZ)] = True
        if end_s > start_s:
            notes.append(span_note("seizure", (start_s, end_s)))
        else:
            notes.append(f"annotation {annotation.text!r} at {annotation.onset:.1f} s spans nothing, labels nothing")
    if not labels_T.any():
        return None, [*notes, "no seizures annotated: treated as background throughout"]
    return labels_T, notes


def _one_line(error: Exception) -> str:
    """What an exception says, in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:117]}{'...' if len(text) > 117 else ''}"
