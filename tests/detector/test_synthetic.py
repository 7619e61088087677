"""The synthetic generator: reproducible, with the spectra, labels and flat stretches that its notes claim."""

import time

import numpy as np
import pytest
from scipy.signal import welch

from detector.recording import CHANNELS, split_note
from detector.synthetic import synthesize_recording

FS = 256


@pytest.fixture(scope="module")
def ten_minutes():
    return synthesize_recording(seed=3, duration_s=600.0)


def spans(recording, prefix):
    """Remark and sample range of the notes that begin with a word."""
    for note in recording.notes:
        what, span_s = split_note(note)
        if span_s and what.startswith(prefix):
            yield what, slice(round(span_s[0] * FS), round(span_s[1] * FS))


def test_same_seed_gives_the_same_bits():
    first, second = (synthesize_recording(seed=11, duration_s=64.3) for _ in range(2))
    assert first.samples_CT.tobytes() == second.samples_CT.tobytes()
    assert np.array_equal(first.labels_T, second.labels_T)
    assert first.notes == second.notes


def test_other_seed_gives_other_samples():
    first, second = (synthesize_recording(seed=seed, duration_s=20.0) for seed in (11, 12))
    assert not np.array_equal(first.samples_CT, second.samples_CT)


def test_global_random_state_has_no_influence():
    first = synthesize_recording(seed=5, duration_s=10.0)
    np.random.seed(123)  # noqa: NPY002
    assert np.array_equal(first.samples_CT, synthesize_recording(seed=5, duration_s=10.0).samples_CT)


def test_is_called_synthetic():
    recording = synthesize_recording(seed=3, duration_s=5.0)
    assert recording.name == "synthetic-0003"
    assert recording.notes[0] == "synthetic"


@pytest.mark.parametrize("duration_s", [1.0, 5.0, 137.3, 150.0])
def test_shape_rate_and_type(duration_s):
    recording = synthesize_recording(seed=0, duration_s=duration_s)
    assert recording.samples_CT.shape == (19, round(duration_s * FS))
    assert recording.samples_CT.dtype == np.float32
    assert recording.labels_T.dtype == np.bool_
    assert recording.fs_hz == 256.0
    assert np.isfinite(recording.samples_CT).all()


@pytest.mark.parametrize("duration_s", [0.0, 0.5, -3.0, float("nan"), float("inf")])
def test_impossible_duration_is_refused(duration_s):
    with pytest.raises(ValueError, match="expected at least 1 s"):
        synthesize_recording(seed=0, duration_s=duration_s)


def test_amplitudes_are_those_of_eeg(ten_minutes):
    std_C = ten_minutes.samples_CT.std(axis=1)
    assert (std_C > 10).all()
    assert (std_C < 60).all()
    assert np.abs(ten_minutes.samples_CT).max() < 1000


@pytest.mark.parametrize("seed", range(4))
def test_alpha_peaks_at_the_back_of_the_head(seed):
    recording = synthesize_recording(seed=seed, duration_s=600.0)
    freqs, power_CF = welch(recording.samples_CT, FS, nperseg=1024, average="median")
    band = (freqs >= 7) & (freqs <= 16)
    for name in ("O1", "O2"):
        # Times f: the 1/f background is level there, so that what remains is the rhythm.
        peak = freqs[band][(power_CF[CHANNELS.index(name)] * freqs)[band].argmax()]
        assert 8 <= peak <= 12
    alpha_C = power_CF[:, (freqs >= 8) & (freqs <= 12)].mean(axis=1)
    theta_C = power_CF[:, (freqs >= 5) & (freqs <= 7)].mean(axis=1)
    ratio_C = alpha_C / theta_C
    assert ratio_C[CHANNELS.index("O1")] > 2
    assert ratio_C[CHANNELS.index("O1")] > 3 * ratio_C[CHANNELS.index("F3")]


def test_background_falls_as_one_over_f(ten_minutes):
    freqs, power_CF = welch(ten_minutes.samples_CT, FS, nperseg=1024, average="median")
    band = (freqs >= 14) & (freqs <= 60)
    slope = np.polyfit(np.log(freqs[band]), np.log(power_CF[CHANNELS.index("Cz")][band]), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.1)


def test_neighbours_correlate_more_than_distant_electrodes(ten_minutes):
    rho = np.corrcoef(ten_minutes.samples_CT)
    near, far = (rho[CHANNELS.index(a), CHANNELS.index(b)] for a, b in (("C3", "P3"), ("Fp1", "O2")))
    assert near > 0.5 > far


def test_labels_are_the_seizures_of_the_notes(ten_minutes):
    expected = np.zeros(600 * FS, dtype=bool)
    seizures = list(spans(ten_minutes, "seizure"))
    for _, span in seizures:
        expected[span] = True
    assert len(seizures) == 4
    assert np.array_equal(ten_minutes.labels_T, expected)


def test_seizure_is_rhythmic_between_3_and_6_hz():
    recording = synthesize_recording(seed=3, duration_s=600.0)
    for _, span in spans(recording, "seizure"):
        middle = slice((3 * span.start + span.stop) // 4, (span.start + 3 * span.stop) // 4)
        freqs, power_CF = welch(recording.samples_CT[:, middle], FS, nperseg=512)
        assert 3 <= freqs[power_CF.sum(axis=0).argmax()] <= 6
        assert recording.samples_CT[:, middle].std() > 1.5 * recording.samples_CT[:, ~recording.labels_T].std()


def test_flat_stretches_are_exactly_constant_and_the_notes_name_all_of_them():
    kinds = set()
    for seed in range(12):
        recording = synthesize_recording(seed=seed, duration_s=170.3)
        claimed = np.zeros(recording.samples_CT.shape, dtype=bool)
        for what, span in spans(recording, "flat"):
            channels = [CHANNELS.index(name) for name in what.split()[1:]]
            assert 1 <= len(channels) <= 3
            claimed[channels, span] = True
            kinds.add("electrodes")
        for _, span in spans(recording, "all channels flat"):
            claimed[:, span] = True
            kinds.add("head box")
        assert np.array_equal(recording.samples_CT == 0.0, claimed)
    assert kinds == {"electrodes", "head box"}


def test_head_box_is_never_off_during_a_seizure():
    for seed in range(20):
        recording = synthesize_recording(seed=seed, duration_s=150.0)
        assert not any(recording.labels_T[span].any() for _, span in spans(recording, "all channels flat"))


def test_notes_are_in_the_order_of_time(ten_minutes):
    starts = [span_s[0] for _, span_s in map(split_note, ten_minutes.notes) if span_s]
    assert starts == sorted(starts)
    assert len(starts) > 10


def test_blinks_stand_out_on_the_forehead():
    recording = synthesize_recording(seed=10, duration_s=40.0)
    assert recording.notes[1] == "eye blinks: 11"
    # Waves of 0.3 s above 60 µV and upright: the background is symmetric, the blinks are not.
    high_C, low_C = (np.quantile(sign * recording.samples_CT, 0.99, axis=1) for sign in (1, -1))
    asymmetry_C = high_C / low_C
    assert asymmetry_C[[CHANNELS.index("Fp1"), CHANNELS.index("Fp2")]].min() > 1.3
    assert asymmetry_C[[CHANNELS.index("O1"), CHANNELS.index("O2")]].max() < 1.2


def test_ten_minutes_take_less_than_a_second_of_processor_time():
    begin = time.process_time()
    synthesize_recording(seed=1, duration_s=600.0)
    assert time.process_time() - begin < 1.0
