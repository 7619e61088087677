"""Synthetic EEG: made up by a seeded generator, never measured on anyone, and named ``synthetic-...`` throughout.

It looks enough like EEG to train on and to fail on: 1/f background that neighbouring electrodes share, an alpha rhythm
at the back of the head, seizures, artefacts, and stretches where electrodes or the whole head box are disconnected. The
last are the point. A disconnected input is exactly constant, and constant channels give the graph of the detector
equal edges, which random numbers never do.

Shape letters: C channel, S source, F frequency, T time sample.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from detector.config import FS_HZ
from detector.recording import CHANNELS, Recording, flat_note, span_note

BLOCK_S = 150.0
"""What can happen is drawn once for about each such stretch of a recording, in s."""

_BACKGROUND_UV = 14.0
_ALPHA_UV = 18.0
_BLINKS_PER_S = 0.2
_SPREAD = 0.45
_ANGLE_RADIUS = {
    "Fp1": (108, 1.0), "F7": (144, 1.0), "T3": (180, 1.0), "T5": (216, 1.0), "O1": (252, 1.0),
    "Fp2": (72, 1.0), "F8": (36, 1.0), "T4": (0, 1.0), "T6": (324, 1.0), "O2": (288, 1.0),
    "F3": (129, 0.66), "F4": (51, 0.66), "P3": (231, 0.66), "P4": (309, 0.66), "C3": (180, 0.5), "C4": (0, 0.5),
    "Fz": (90, 0.5), "Cz": (0, 0.0), "Pz": (270, 0.5),
}  # fmt: skip


@dataclass(frozen=True)
class _Event:
    """Something that happens to some channels for a while."""

    what: str
    channels: tuple[int, ...]
    start_s: float
    end_s: float

    @property
    def window(self) -> slice:
        return slice(round(self.start_s * FS_HZ), round(self.end_s * FS_HZ))

    @property
    def note(self) -> str:
        names = [CHANNELS[channel] for channel in self.channels]
        span_s = (self.start_s, self.end_s)
        if self.what == "flat":
            return flat_note(names, span_s)
        return span_note(" ".join([self.what, *names]) if self.what != "seizure" else self.what, span_s)


def synthesize_recording(*, seed: int, duration_s: float) -> Recording:
    """A synthetic recording, the same bits for the same arguments.

    Per ``BLOCK_S``: a seizure of 15-45 s in three of four blocks (3-6 Hz, spreading from one electrode, slowing down),
    one to three disconnected electrodes for 8-30 s in three of five, the whole head box disconnected for 5-15 s in
    three of ten, and now and then muscle and electrode pops. Eyes blink every five seconds or so. A disconnected
    channel is exactly 0 µV. The head box is never disconnected during a seizure; single electrodes may be.

    Args:
        seed: Number of the recording, >= 0; its name is ``synthetic-<seed>``.
        duration_s: Length in s, at least 1; rounded to a whole sample.

    Returns:
        (19, T) float32 in µV at 256 Hz with labels. The notes say what happens when, to a tenth of a second.

    Raises:
        ValueError: If the duration is below 1 s or not finite, or the seed negative.
    """
    if not 1.0 <= duration_s < float("inf"):
        raise ValueError(f"duration is {duration_s} s; expected at least 1 s")
    rng = np.random.default_rng(seed)
    num_samples = round(duration_s * FS_HZ)
    events = _plan_events(rng, duration_s=num_samples / FS_HZ)
    samples_CT = _background(rng, num_samples)
    num_blinks = _add_blinks(rng, samples_CT)
    labels_T = np.zeros(num_samples, dtype=np.bool_)
    # Disconnection comes last in the plan and overwrites whatever the electrode would have picked up.
    for event in events:
        part_CT = samples_CT[:, event.window]
        if event.what == "seizure":
            part_CT += _seizure(rng, part_CT.shape[1], focus=event.channels[0])
            labels_T[event.window] = True
        elif event.what == "muscle":
            part_CT[list(event.channels)] += _muscle(rng, (len(event.channels), part_CT.shape[1]))
        elif event.what == "electrode pop":
            part_CT[list(event.channels)] += _pop(rng, part_CT.shape[1])
        else:
            part_CT[list(event.channels)] = 0.0
    notes = ["synthetic", f"eye blinks: {num_blinks}"]
    notes += [event.note for event in sorted(events, key=lambda event: event.start_s)]
    return Recording(f"synthetic-{seed:04d}", samples_CT, FS_HZ, labels_T, tuple(notes))


def _positions() -> NDArray[np.float64]:
    """(C, 2) places on the scalp seen from above: the outer ring of electrodes is the unit circle, the nose at +y."""
    angle, radius = np.array([_ANGLE_RADIUS[name] for name in CHANNELS]).T
    return radius[:, None] * np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))], axis=1)


_POSITIONS = _positions()
_DISTANCES = np.linalg.norm(_POSITIONS[:, None] - _POSITIONS[None], axis=-1)
_FRONTAL = np.clip((_POSITIONS[:, 1] - 0.2) / 0.75, 0.0, 1.0) ** 2
_TEMPORAL = (("F7", "T3", "T5"), ("F8", "T4", "T6"))


def _background(rng: np.random.Generator, num_samples: int) -> NDArray[np.float32]:
    """(C, T) 1/f background and posterior alpha, drawn as spectra and transformed once."""
    length = scipy.fft.next_fast_len(num_samples, real=True)
    freqs_F = scipy.fft.rfftfreq(length, 1.0 / FS_HZ)
    # Flat below 1 Hz and nothing at 0 Hz, as behind the high-pass of an amplifier.
    pink_F = 1.0 / np.sqrt(np.maximum(freqs_F, 1.0))
    pink_F[0] = 0.0
    alpha_F = np.exp(-0.5 * ((freqs_F - rng.uniform(8.8, 11.2)) / 0.5) ** 2)
    kinds_2F = np.stack([pink_F, alpha_F])
    # The real and imaginary parts drawn below have unit variance; this scale makes each source 1 µV RMS.
    kinds_2F *= length / 2.0 / np.sqrt(np.sum(kinds_2F**2, axis=1, keepdims=True))
    shape_SF = kinds_2F.astype(np.float32)[[0] * len(CHANNELS) + [1] * 2]
    spectrum_SF = np.empty(shape_SF.shape, dtype=np.complex64)
    spectrum_SF.real = rng.standard_normal(shape_SF.shape, dtype=np.float32) * shape_SF
    spectrum_SF.imag = rng.standard_normal(shape_SF.shape, dtype=np.float32) * shape_SF
    sources_ST = scipy.fft.irfft(spectrum_SF, n=length, axis=1, overwrite_x=True)[:, :num_samples]
    return np.ascontiguousarray(_mixing(rng) @ sources_ST)


def _mixing(rng: np.random.Generator) -> NDArray[np.float32]:
    """(C, S) from 19 background sources, one under each electrode, and two alpha sources at the back, to electrodes."""
    local_CC = np.exp(-0.5 * (_DISTANCES / _SPREAD) ** 2)
    local_CC *= _BACKGROUND_UV * rng.uniform(0.8, 1.2, (len(CHANNELS), 1)) / np.linalg.norm(local_CC, axis=1)[:, None]
    occipital = [CHANNELS.index("O1"), CHANNELS.index("O2")]
    alpha_C2 = _ALPHA_UV * rng.uniform(0.7, 1.3) * np.exp(-0.5 * (_DISTANCES[:, occipital] / 0.6) ** 2)
    return np.concatenate([local_CC, alpha_C2], axis=1).astype(np.float32)


def _add_blinks(rng: np.random.Generator, samples_CT: NDArray[np.float32]) -> int:
    """Add positive waves of 0.3 s that fade from the forehead backwards; how many there were."""
    length = round(0.3 * FS_HZ)
    shape_L = np.sin(np.pi * np.arange(length) / length) ** 2
    room = samples_CT.shape[1] - length
    starts = rng.integers(0, room, size=rng.poisson(_BLINKS_PER_S * room / FS_HZ))
    for start in starts:
        samples_CT[:, start : start + length] += np.outer(_FRONTAL, rng.uniform(60.0, 150.0) * shape_L)
    return len(starts)


def _seizure(rng: np.random.Generator, num_samples: int, *, focus: int) -> NDArray[np.float64]:
    """(C, T) rhythmic sharp waves in µV that slow down and reach distant electrodes later and weaker."""
    progress_T = np.arange(num_samples) / num_samples
    first_hz, last_hz = rng.uniform(5.0, 6.0), rng.uniform(3.0, 3.8)
    phase_T = 2.0 * np.pi * np.cumsum(first_hz + (last_hz - first_hz) * progress_T) / FS_HZ
    wave_T = np.sin(phase_T) + 0.5 * np.sin(2.0 * phase_T + 0.7) + 0.25 * np.sin(3.0 * phase_T + 1.4)
    distance_C1 = _DISTANCES[focus][:, None]
    reached_CT = np.clip((progress_T - 0.2 * distance_C1) / 0.15, 0.0, 1.0)
    ending_T = np.clip((1.0 - progress_T) / 0.05, 0.0, 1.0)
    return rng.uniform(60.0, 110.0) * np.exp(-0.6 * distance_C1) * reached_CT * ending_T * wave_T


def _muscle(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """A burst of noise in µV that is strongest towards the Nyquist rate, with soft ends."""
    noise = np.diff(rng.standard_normal((shape[0], shape[1] + 1)), axis=1)
    return rng.uniform(15.0, 40.0) * np.hanning(shape[1]) * noise


def _pop(rng: np.random.Generator, num_samples: int) -> NDArray[np.float64]:
    """A step in µV that decays with a time constant of 0.12 s and ends at zero."""
    time_T = np.arange(num_samples) / FS_HZ
    fade_T = 1.0 - np.arange(num_samples) / num_samples
    return rng.choice([-1.0, 1.0]) * rng.uniform(150.0, 400.0) * np.exp(-time_T / 0.12) * fade_T


def _plan_events(rng: np.random.Generator, *, duration_s: float) -> list[_Event]:
    """What happens in the recording, disconnections last."""
    num_blocks = max(1, round(duration_s / BLOCK_S))
    # Times are whole tenths of a second, so that a note gives them exactly.
    edges = [int(10.0 * duration_s * block / num_blocks) for block in range(num_blocks + 1)]
    events: list[_Event] = []
    for begin, end in itertools.pairwise(edges):
        events += _plan_block(rng, begin, end)
    return sorted(events, key=lambda event: event.what == "flat")


def _plan_block(rng: np.random.Generator, begin: int, end: int) -> list[_Event]:
    """What happens between two times, given in tenths of a second."""
    everywhere = tuple(range(len(CHANNELS)))
    events: list[_Event] = []
    quiet = (begin, end)
    if rng.random() < 0.75 and (span := _draw_span(rng, (begin, end), 150, 450)):
        events.append(_event("seizure", (int(rng.integers(len(CHANNELS))),), span))
        quiet = max((begin, span[0]), (span[1], end), key=lambda gap: gap[1] - gap[0])
    if rng.random() < 0.6 and (span := _draw_span(rng, (begin, end), 80, 300)):
        nearest = np.argsort(_DISTANCES[rng.integers(len(CHANNELS))])[: rng.integers(1, 4)]
        events.append(_event("flat", tuple(sorted(nearest.tolist())), span))
    if rng.random() < 0.3 and (span := _draw_span(rng, quiet, 50, 150)):
        events.append(_event("flat", everywhere, span))
    return events + _plan_artefacts(rng, (begin, end))


def _plan_artefacts(rng: np.random.Generator, within: tuple[int, int]) -> list[_Event]:
    """Muscle of one temple and electrode pops."""
    events: list[_Event] = []
    for _ in range(rng.poisson(1.5)):
        side = tuple(CHANNELS.index(name) for name in _TEMPORAL[rng.integers(2)])
        if span := _draw_span(rng, within, 10, 40):
            events += [_event("muscle", side, span)]
    for _ in range(rng.poisson(0.8)):
        if span := _draw_span(rng, within, 8, 8):
            events += [_event("electrode pop", (int(rng.integers(len(CHANNELS))),), span)]
    return events


def _event(what: str, channels: tuple[int, ...], span: tuple[int, int]) -> _Event:
    return _Event(what, channels, span[0] / 10.0, span[1] / 10.0)


def _draw_span(
    rng: np.random.Generator, within: tuple[int, int], shortest: int, longest: int
) -> tuple[int, int] | None:
    """A random span inside another, in tenths of a second; None where the shortest does not fit."""
    room = within[1] - within[0]
    if room < shortest:
        return None
    length = int(rng.integers(shortest, min(longest, room) + 1))
    start = int(rng.integers(within[0], within[1] - length + 1))
    return start, start + length
