"""Windows and batches: standardized channels, zero-padded tails, seeded order, sources that tell what is inside."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector.config import SMALL, V3
from detector.recording import CHANNELS, Recording, RecordingError
from detector.windows import (
    cut_windows,
    recording_batches,
    recording_windows,
    standardize,
    synthetic_batches,
    window_samples,
)

CONFIG = SMALL.train


def noise(seconds, *, name="night", labels=None, notes=(), seed=0, offset_uv=0.0):
    samples = np.random.default_rng(seed).standard_normal((19, round(seconds * 256)), dtype=np.float32)
    samples = samples * np.float32(20.0) + np.float32(offset_uv)
    return Recording(name, samples, 256.0, labels, tuple(notes))


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(first, second):
    return (
        torch.equal(first["windows"], second["windows"])
        and torch.equal(first["labels"], second["labels"])
        and first["sources"] == second["sources"]
    )


def test_channels_get_mean_0_and_deviation_1():
    scaled = standardize(noise(30, offset_uv=300.0))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(axis=1, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=1, dtype=np.float64), 1, atol=1e-6)


def test_standardizing_does_not_depend_on_the_unit():
    recording = noise(10)
    small = replace(recording, samples_CT=recording.samples_CT * np.float32(2.0**-30))
    assert np.array_equal(standardize(small), standardize(recording))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-30, 3e4])
def test_flat_channel_becomes_exactly_zero(value):
    recording = noise(10)
    recording.samples_CT[9] = value
    recording.samples_CT[4] = value
    recording.samples_CT[4, ::2] = np.nextafter(np.float32(value), np.float32(np.inf)) if value else 0.0
    scaled = standardize(recording)
    assert not scaled[[4, 9]].any()
    assert np.abs(scaled[10]).max() > 1


def test_recording_that_is_flat_throughout_becomes_zero():
    assert not standardize(replace(noise(5), samples_CT=np.full((19, 1280), 7.3, np.float32))).any()


def test_large_artefact_is_not_clamped():
    recording = noise(60)
    recording.samples_CT[0, 100] = 20_000.0
    assert standardize(recording)[0, 100] > 100


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_sample_is_refused_with_its_channel(value):
    recording = noise(5)
    recording.samples_CT[CHANNELS.index("T5"), 3] = value
    with pytest.raises(RecordingError, match="night has non-finite samples in T5"):
        standardize(recording)


def test_windows_are_consecutive_and_the_tail_is_padded_with_exact_zeros():
    samples = np.arange(1, 19 * 100 + 1, dtype=np.float32).reshape(19, 100)
    labels = np.arange(100) % 3 == 0
    windows, window_labels = cut_windows(samples, labels, 48)
    assert windows.shape == (3, 19, 48)
    assert window_labels.shape == (3, 48)
    assert windows.dtype == window_labels.dtype == np.float32
    assert np.array_equal(windows[1], samples[:, 48:96])
    assert np.array_equal(windows[2, :, :4], samples[:, 96:])
    assert not windows[2, :, 4:].any()
    assert np.array_equal(np.concatenate(list(window_labels))[:100], labels.astype(np.float32))
    assert not window_labels[2, 4:].any()


def test_whole_number_of_windows_is_not_padded():
    windows, labels = cut_windows(np.ones((19, 96), np.float32), None, 48)
    assert windows.shape == (2, 19, 48)
    assert windows.all()
    assert not labels.any()


@pytest.mark.parametrize("length", [0, -16, 40])
def test_window_that_is_no_multiple_of_16_is_refused(length):
    with pytest.raises(ValueError, match="positive multiple of 16"):
        cut_windows(np.ones((19, 96), np.float32), None, length)


@pytest.mark.parametrize("window_s", [0.0, -1.0, 10.03, float("nan")])
def test_window_length_of_the_configuration_is_checked_before_the_first_batch(window_s):
    with pytest.raises(ValueError, match="positive multiple of 16"):
        synthetic_batches(replace(CONFIG, window_s=window_s))


def test_window_lengths_of_the_presets():
    assert window_samples(V3.train) == 15360
    assert window_samples(SMALL.train) == 2560


def test_sources_tell_span_and_what_is_inside():
    notes = ["synthetic", "flat T3 T5 12.0-31.5 s", "seizure 9.0-12.0 s", "all channels flat 20.0-30.0 s"]
    sources = [window.source for window in recording_windows(noise(37.3, notes=notes), 2560)]
    assert sources == [
        "night 0.0-10.0 s: seizure 9.0-10.0 s",
        "night 10.0-20.0 s: flat T3 T5 12.0-20.0 s; seizure 10.0-12.0 s",
        "night 20.0-30.0 s: flat T3 T5; all channels flat",
        "night 30.0-37.3 s: flat T3 T5 30.0-31.5 s; zero-padded tail 2.7 s",
    ]


def test_whole_last_window_has_no_tail():
    assert [window.source for window in recording_windows(noise(20), 2560)] == ["night 0.0-10.0 s", "night 10.0-20.0 s"]


def test_recording_at_another_rate_is_refused():
    with pytest.raises(RecordingError, match="sampled at 250 Hz; expected 256 Hz"):
        recording_windows(replace(noise(10), fs_hz=250.0), 2560)


@pytest.mark.parametrize("preset", [V3.train, SMALL.train])
def test_batches_have_the_form_the_trainer_expects(preset):
    batch = next(synthetic_batches(preset))
    assert set(batch) == {"windows", "labels", "sources"}
    length = window_samples(preset)
    assert batch["windows"].shape == (preset.batch_size, 19, length)
    assert batch["labels"].shape == (preset.batch_size, length)
    assert batch["windows"].dtype == batch["labels"].dtype == torch.float32
    assert batch["windows"].is_contiguous()
    assert len(batch["sources"]) == preset.batch_size
    assert set(batch["labels"].unique().tolist()) <= {0.0, 1.0}
    assert torch.isfinite(batch["windows"]).all()


def test_same_seed_gives_the_same_batches_and_another_does_not():
    first, second, other = (take(synthetic_batches(config), 20) for config in (CONFIG, CONFIG, replace(CONFIG, seed=1)))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


def test_batches_own_their_memory():
    first, second = take(synthetic_batches(CONFIG), 2), take(synthetic_batches(CONFIG), 2)
    first[0]["windows"].fill_(float("nan"))
    assert torch.isfinite(second[0]["windows"]).all()
    batches = recording_batches([noise(10)], CONFIG)
    next(batches)["windows"].fill_(float("nan"))
    assert torch.isfinite(next(batches)["windows"]).all()


@pytest.mark.parametrize("preset", [V3.train, SMALL.train])
def test_about_a_third_of_the_windows_has_a_seizure(preset):
    has_seizure = [window.any().item() for batch in take(synthetic_batches(preset), 60) for window in batch["labels"]]
    assert 0.25 < np.mean(has_seizure) < 0.45


def test_sources_agree_with_the_samples():
    kinds = set()
    for batch in take(synthetic_batches(CONFIG), 150):
        for window_CL, labels_L, source in zip(batch["windows"], batch["labels"], batch["sources"], strict=True):
            _, _, remarks = source.partition(": ")
            padded_s = float(remarks.rpartition("zero-padded tail ")[2].removesuffix(" s")) if "tail" in remarks else 0
            real_CL = window_CL[:, : window_CL.shape[1] - round(padded_s * 256) or None]
            assert bool(labels_L.any()) == ("seizure" in remarks)
            if padded_s:
                kinds.add("tail")
                assert not window_CL[:, -int(padded_s * 256) + 26 :].any()
                assert window_CL[:, 0].any()
            if remarks == "all channels flat":
                kinds.add("head box")
                assert (real_CL == real_CL[:, :1]).all()
            elif remarks.startswith("flat ") and "0 s" not in remarks and ";" not in remarks:
                kinds.add("electrode")
                rows = [CHANNELS.index(name) for name in remarks.split()[1:] if name in CHANNELS]
                is_flat = (window_CL == window_CL[:, :1]).all(dim=1)
                if remarks.split()[-1] in CHANNELS:
                    assert is_flat.nonzero().flatten().tolist() == sorted(rows)
    assert {"tail", "electrode"} <= kinds


def test_every_window_of_the_recordings_comes_once_a_pass():
    recordings = [noise(35, name="one"), noise(20, name="two", seed=1), noise(3.2, name="short", seed=2)]
    batches = recording_batches(recordings, replace(CONFIG, batch_size=7))
    expected = {
        "one 0.0-10.0 s",
        "one 10.0-20.0 s",
        "one 20.0-30.0 s",
        "one 30.0-35.0 s: zero-padded tail 5.0 s",
        "two 0.0-10.0 s",
        "two 10.0-20.0 s",
        "short 0.0-3.2 s: zero-padded tail 6.8 s",
    }
    passes = take(batches, 3)
    assert all(set(batch["sources"]) == expected for batch in passes)
    assert len({tuple(batch["sources"]) for batch in passes}) == 3


def test_batch_larger_than_all_windows_is_filled_from_the_next_pass():
    batch = next(recording_batches([noise(12)], CONFIG))
    assert batch["windows"].shape == (4, 19, 2560)
    assert len(set(batch["sources"])) == 2


def test_order_of_recordings_follows_the_seed():
    recordings = [noise(200)]
    first, second, other = (
        take(recording_batches(recordings, config), 5) for config in (CONFIG, CONFIG, replace(CONFIG, seed=9))
    )
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_labels_of_a_recording_reach_the_batch():
    labels = np.zeros(2560, dtype=bool)
    labels[100:900] = True
    batch = next(recording_batches([noise(10, labels=labels)], replace(CONFIG, batch_size=1)))
    assert np.array_equal(batch["labels"][0].numpy(), labels.astype(np.float32))


def test_no_recordings_are_refused():
    with pytest.raises(ValueError, match="no recordings"):
        recording_batches([], CONFIG)
