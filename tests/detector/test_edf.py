"""EDF files written with known sines: read back at 256 Hz in µV, or refused in one line that says why."""

import warnings
from pathlib import Path

import edfio
import numpy as np
import pytest

from detector.edf import read_edf
from detector.recording import CHANNELS, Recording, RecordingError, clean_channel_name, flat_runs, split_note

AMPLITUDE_UV = 50.0


def sine(fs, seconds, channel, *, freq_hz=10.0):
    return AMPLITUDE_UV * np.sin(2 * np.pi * freq_hz * np.arange(int(fs * seconds)) / fs + channel)


def signal(data, fs, label, *, unit="uV", limit=500.0):
    return edfio.EdfSignal(data, fs, label=label, physical_dimension=unit, physical_range=(-limit, limit))


def sines(fs=256, seconds=20, labels=CHANNELS, **kwargs):
    return [signal(sine(fs, seconds, channel), fs, label, **kwargs) for channel, label in enumerate(labels)]


def write(folder: Path, signals, *, name="night.edf", **kwargs) -> Path:
    path = folder / name
    edfio.Edf(signals, data_record_duration=1.0, **kwargs).write(path)
    return path


def patch(path: Path, offset: int, value: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)
    return path


def patch_signal(path: Path, field_offset: int, width: int, value: bytes, *, index=0) -> Path:
    """Overwrite a field of one signal header; the offset is the sum of the widths of the fields before."""
    num_signals = int(path.read_bytes()[252:256])
    return patch(path, 256 + field_offset * num_signals + width * index, value.ljust(width))


def refusal(path: Path) -> str:
    with pytest.raises(RecordingError) as caught:
        read_edf(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert caught.value.message[-1] != "."
    return text


@pytest.mark.parametrize("fs", [128, 200, 250, 256, 512])
@pytest.mark.parametrize("freq_hz", [3.0, 10.0, 40.0])
def test_sines_survive_resampling(tmp_path, fs, freq_hz):
    signals = [signal(sine(fs, 20, channel, freq_hz=freq_hz), fs, name) for channel, name in enumerate(CHANNELS)]
    recording = read_edf(write(tmp_path, signals))
    assert recording.name == "night"
    assert recording.fs_hz == 256.0
    assert recording.samples_CT.shape == (19, 20 * 256)
    assert recording.samples_CT.dtype == np.float32
    expected_CT = np.stack([sine(256, 20, channel, freq_hz=freq_hz) for channel in range(19)])
    error_CT = np.abs(recording.samples_CT - expected_CT)
    # Besides the filter, rounding to the digital values of the file: 15 nV in 50 µV.
    assert error_CT[:, 26:-26].max() / AMPLITUDE_UV < 2.3e-3
    if freq_hz <= 10:
        assert error_CT.max() / AMPLITUDE_UV < 0.1


def test_channels_are_put_in_the_order_of_the_model(tmp_path):
    signals = [signal(sine(256, 4, channel), 256, name) for channel, name in enumerate(CHANNELS)]
    extra = signal(np.zeros(4 * 256), 256, "ECG")
    recording = read_edf(write(tmp_path, [extra, *reversed(signals)]))
    np.testing.assert_allclose(recording.samples_CT, [sine(256, 4, channel) for channel in range(19)], atol=0.02)


def test_channels_of_different_rates_end_up_equally_long(tmp_path):
    signals = [signal(sine(128 if i % 2 else 250, 20, i), 128 if i % 2 else 250, n) for i, n in enumerate(CHANNELS)]
    recording = read_edf(write(tmp_path, signals))
    expected_CT = np.stack([sine(256, 20, channel) for channel in range(19)])
    assert np.abs(recording.samples_CT - expected_CT)[:, 256:-256].max() / AMPLITUDE_UV < 5e-3


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("EEG Fp1-LE", "Fp1"),
        ("EEG FP2-REF", "Fp2"),
        ("eeg o1-ar", "O1"),
        ("Fz..", "Fz"),
        ("C 3", "C3"),
        ("T7", "T3"),
        ("EEG T8-Ref", "T4"),
        ("P7.", "T5"),
        ("p8", "T6"),
        ("T3", "T3"),
        ("T7-P7", "T7-P7"),
        ("EKG", "EKG"),
        ("Fp1-F7", "FP1-F7"),
    ],
)
def test_channel_names_are_cleaned(label, name):
    assert clean_channel_name(label) == name


def test_ten_ten_names_are_read(tmp_path):
    modern = {"T3": "EEG T7-REF", "T4": "T8..", "T5": "P7", "T6": "EEG P8-LE"}
    recording = read_edf(write(tmp_path, sines(labels=[modern.get(name, name) for name in CHANNELS])))
    np.testing.assert_allclose(recording.samples_CT[5], sine(256, 20, 5), atol=0.02)


def test_missing_electrodes_are_named(tmp_path):
    text = refusal(write(tmp_path, sines(labels=[n for n in CHANNELS if n not in ("Fz", "T6")])))
    assert "lacks 2 of 19 electrodes: Fz T6;" in text


def test_control_characters_in_labels_are_escaped(tmp_path):
    text = refusal(patch_signal(write(tmp_path, sines()), 0, 16, b"F\n\x1b[31m", index=2))
    assert "\x1b" not in text
    assert "lacks 1 of 19 electrodes: C3;" in text


def test_two_signals_for_one_electrode_are_refused(tmp_path):
    assert "two signals for T3: 'T3' and 'EEG T7-REF'" in refusal(
        write(tmp_path, sines(labels=[*CHANNELS, "EEG T7-REF"]))
    )


@pytest.mark.parametrize(
    ("unit", "per_uv"), [("uV", 1.0), ("UV", 1.0), ("mV", 1e-3), ("V", 1e-6), ("", 1.0), (" uV", 1.0)]
)
def test_units_are_converted(tmp_path, unit, per_uv):
    limit = {1e-3: 0.5, 1e-6: 0.0005}.get(per_uv, 500.0)
    signals = [signal(sine(256, 8, i) * per_uv, 256, n, unit=unit, limit=limit) for i, n in enumerate(CHANNELS)]
    expected_CT = [sine(256, 8, channel) for channel in range(19)]
    np.testing.assert_allclose(read_edf(write(tmp_path, signals)).samples_CT, expected_CT, atol=0.02)


@pytest.mark.parametrize("unit", [b"\xb5V", b"\xc2\xb5V"])
def test_micro_sign_is_understood_in_latin_1_and_utf_8(tmp_path, unit):
    path = patch_signal(write(tmp_path, sines()), 96, 8, unit, index=4)
    np.testing.assert_allclose(read_edf(path).samples_CT[4], sine(256, 20, 4), atol=0.02)


def test_unit_that_is_no_voltage_is_refused(tmp_path):
    assert "has Fp1 in 'mmHg'" in refusal(patch_signal(write(tmp_path, sines()), 96, 8, b"mmHg"))


def test_microvolts_called_volts_are_refused(tmp_path):
    text = refusal(patch_signal(write(tmp_path, sines()), 96, 8, b"V"))
    assert "standard deviation of 3.535e+07 µV in Fp1" in text


@pytest.mark.parametrize(
    ("field_offset", "value"),
    [
        (104, b"500"),
        (104, b"-500,0"),
        (104, b"nan"),
        (112, b""),
        (120, b"32767"),
        (120, b"40000"),
        (128, b"x"),
    ],
    ids=["phys equal", "comma", "nan", "blank", "dig equal", "dig swapped", "dig text"],
)
def test_uncalibrated_channel_is_refused(tmp_path, field_offset, value):
    text = refusal(patch_signal(write(tmp_path, sines()), field_offset, 8, value, index=7))
    assert "no calibration for O1" in text


def test_absurd_amplitude_is_refused(tmp_path):
    signals = sines()
    signals[9] = signal(sine(256, 20, 9) * 20, 256, "Cz", limit=2000.0)
    assert "standard deviation of 707.1 µV in Cz; EEG stays below 500 µV" in refusal(write(tmp_path, signals))


def test_overflowing_calibration_is_refused(tmp_path):
    path = patch_signal(write(tmp_path, sines()), 104, 8, b"-1e308")
    assert "standard deviation of" in refusal(patch_signal(path, 112, 8, b"1e308"))


@pytest.mark.parametrize("fs", [1, 32])
def test_slow_channel_is_refused(tmp_path, fs):
    signals = sines()
    signals[3] = signal(np.arange(20.0 * fs) % 7, fs, "P3")
    assert f"P3 at {fs} Hz; EEG is sampled at 64 to 100000 Hz" in refusal(write(tmp_path, signals))


def test_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.edf")


def test_folder_is_refused(tmp_path):
    assert "cannot read" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"0" * 100, b"\x1f\x8b" + b"\x00" * 9000, b"\xffBIOSEMI" + b" " * 5000, bytes(range(256)) * 40]
)
def test_file_that_is_not_edf_is_refused(tmp_path, content):
    path = tmp_path / "other.edf"
    path.write_bytes(content)
    assert "is not an EDF file" in refusal(path)


@pytest.mark.parametrize("keep", [3000, 5120, -7, -10_000])
def test_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path, sines())
    path.write_bytes(path.read_bytes()[:keep])
    refusal(path)


def test_length_that_is_not_the_headers_is_told_in_records(tmp_path):
    path = write(tmp_path, sines())
    path.write_bytes(path.read_bytes()[:-4864])
    assert "holds 19.5 data records, its header promises 20" in refusal(path)


def test_trailing_bytes_are_refused(tmp_path):
    path = write(tmp_path, sines())
    path.write_bytes(path.read_bytes() + b"junk")
    assert "its header promises 20" in refusal(path)


def test_wrong_header_size_is_refused(tmp_path):
    assert "header of 4864 bytes for 19 signals" in refusal(patch(write(tmp_path, sines()), 184, b"4864    "))


def test_unfinished_recording_is_read_with_a_note(tmp_path):
    recording = read_edf(patch(write(tmp_path, sines()), 236, b"-1      "))
    assert recording.samples_CT.shape == (19, 5120)
    assert any(note.startswith("edfio: ") and "-1 data records" in note for note in recording.notes)


def test_warnings_of_edfio_are_not_printed(tmp_path):
    path = patch(write(tmp_path, sines()), 236, b"-1      ")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_edf(path)
    assert caught == []


def test_file_reencoded_as_utf_8_is_refused(tmp_path):
    path = write(tmp_path, sines())
    path.write_bytes(path.read_bytes().decode("utf-8", errors="replace").encode())
    assert "as if it were UTF-8 text" in refusal(path)


def test_file_with_converted_line_ends_is_refused(tmp_path):
    path = write(tmp_path, sines())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert "line ends converted to CRLF" in refusal(path)


def test_discontinuous_recording_is_refused(tmp_path):
    path = write(tmp_path, sines(), annotations=[])
    raw = path.read_bytes().replace(b"EDF+C", b"EDF+D", 1)
    path.write_bytes(raw.replace(b"+10\x14\x14", b"+90\x14\x14", 1))
    assert "is discontinuous (EDF+D)" in refusal(path)


def test_edf_d_without_gaps_is_read(tmp_path):
    path = write(tmp_path, sines(), annotations=[])
    path.write_bytes(path.read_bytes().replace(b"EDF+C", b"EDF+D", 1))
    assert read_edf(path).samples_CT.shape == (19, 5120)


@pytest.mark.parametrize("fs", [200, 256])
def test_flat_channel_is_noted_and_stays_exactly_constant(tmp_path, fs):
    signals = sines(fs)
    signals[9] = signal(np.full(20 * fs, 123.0), fs, "Cz")
    recording = read_edf(write(tmp_path, signals))
    assert "flat Cz 0.0-20.0 s" in recording.notes
    assert np.ptp(recording.samples_CT[9]) == 0.0
    assert recording.samples_CT[9, 0] == pytest.approx(123.0, abs=0.01)


@pytest.mark.parametrize("fs", [200, 256, 512])
def test_flat_stretch_is_noted_and_stays_exactly_constant(tmp_path, fs):
    signals = sines(fs)
    for index in (5, 6):
        data = sine(fs, 20, index)
        data[5 * fs : 9 * fs] = 40.0
        signals[index] = signal(data, fs, CHANNELS[index])
    recording = read_edf(write(tmp_path, signals))
    assert "flat T3 T5 5.0-9.0 s" in recording.notes
    assert np.ptp(recording.samples_CT[5:7, 5 * 256 : 9 * 256 - 2], axis=1).tolist() == [0.0, 0.0]
    assert np.ptp(recording.samples_CT[5:7, 9 * 256 : 10 * 256], axis=1).min() > 50


def test_head_box_off_is_one_note(tmp_path):
    data = np.stack([sine(256, 20, channel) for channel in range(19)])
    data[:, 256:1024] = 0.0
    recording = read_edf(write(tmp_path, [signal(x, 256, n) for x, n in zip(data, CHANNELS, strict=True)]))
    assert "all channels flat 1.0-4.0 s" in recording.notes


def test_nearly_flat_channel_is_noted(tmp_path):
    signals = sines()
    signals[9] = signal(sine(256, 20, 9) / 100, 256, "Cz", limit=5.0)
    assert "nearly flat Cz (standard deviation 0.35 µV) 0.0-20.0 s" in read_edf(write(tmp_path, signals)).notes


def test_healthy_recording_without_annotations_has_one_note(tmp_path):
    recording = read_edf(write(tmp_path, sines()))
    assert recording.labels_T is None
    assert recording.notes == ("no seizures annotated: treated as background throughout",)


def test_seizure_annotations_become_labels(tmp_path):
    annotations = [
        edfio.EdfAnnotation(2.0, 3.5, "Seizure, focal"),
        edfio.EdfAnnotation(10.0, 2.0, "SZ 2"),
        edfio.EdfAnnotation(18.0, 9.0, "seiz"),
        edfio.EdfAnnotation(7.0, 1.0, "eyes closed, puszta"),
    ]
    recording = read_edf(write(tmp_path, sines(), annotations=annotations))
    expected = np.zeros(5120, dtype=bool)
    expected[512:1408] = expected[2560:3072] = expected[4608:] = True
    assert np.array_equal(recording.labels_T, expected)
    assert recording.notes == ("seizure 2.0-5.5 s", "seizure 10.0-12.0 s", "seizure 18.0-20.0 s")


def test_seizure_annotation_without_duration_labels_nothing_and_says_so(tmp_path):
    path = write(tmp_path, sines(), annotations=[edfio.EdfAnnotation(4.0, None, "sz onset")])
    recording = read_edf(path)
    assert recording.labels_T is None
    assert recording.notes[0] == "annotation 'sz onset' at 4.0 s spans nothing, labels nothing"


def test_unreadable_annotations_are_refused(tmp_path):
    path = write(tmp_path, sines(), annotations=[edfio.EdfAnnotation(4.0, 2.0, "seizure xxx")])
    path.write_bytes(path.read_bytes().replace(b"seizure xxx", b"seizure \xe4\xf6\xfc"))
    assert "annotations that cannot be read: UnicodeDecodeError" in refusal(path)


def test_damaged_headers_are_refused_or_read_but_never_crash(tmp_path):
    path = write(tmp_path, sines(seconds=2), annotations=[edfio.EdfAnnotation(0.5, 1.0, "seizure")])
    clean = path.read_bytes()
    rng = np.random.default_rng(0)
    num_refused, num_lines = 0, set()
    for _ in range(200):
        raw = bytearray(clean)
        for offset in rng.integers(0, 256 * 21 if rng.random() < 0.8 else len(raw), size=rng.integers(1, 6)):
            raw[offset] = rng.choice([*b" 0-9.eE+xN", int(rng.integers(256))])
        path.write_bytes(raw)
        try:
            assert np.isfinite(read_edf(path).samples_CT).all()
        except RecordingError as error:
            num_refused += 1
            num_lines.add(len(str(error).splitlines()))
    assert num_lines == {1}
    assert 20 < num_refused < 200


def test_flat_runs_are_found_at_both_ends():
    samples = np.array([1, 1, 1, 2, 3, 3, 4, 4, 4, 4], dtype=np.float32)
    assert flat_runs(samples, min_samples=3) == [(0, 3), (6, 10)]
    assert flat_runs(np.ones(5), min_samples=3) == [(0, 5)]
    assert flat_runs(np.ones(2), min_samples=3) == []


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ("flat T3 T5 12.0-31.5 s", ("flat T3 T5", (12.0, 31.5))),
        ("all channels flat 40.0-55.0 s", ("all channels flat", (40.0, 55.0))),
        ("eye blinks: 12", ("eye blinks: 12", None)),
    ],
)
def test_notes_are_split(note, expected):
    assert split_note(note) == expected


@pytest.mark.parametrize(
    ("samples", "labels", "match"),
    [
        (np.zeros((18, 10), np.float32), None, "shape"),
        (np.zeros((19, 0), np.float32), None, "shape"),
        (np.zeros(19, np.float32), None, "shape"),
        (np.zeros((19, 10)), None, "float64; expected float32"),
        (np.zeros((19, 10), np.float32), np.zeros(9, bool), "labels"),
        (np.zeros((19, 10), np.float32), np.zeros(10), "labels"),
    ],
)
def test_recording_of_the_wrong_form_is_refused(samples, labels, match):
    with pytest.raises(ValueError, match=match):
        Recording("x", samples, 256.0, labels)


def test_rounding_of_digital_values_is_all_that_differs_at_256_hz(tmp_path):
    step_uv = 1000.0 / 65535
    recording = read_edf(write(tmp_path, sines(seconds=4)))
    assert 0 < np.abs(recording.samples_CT[0] - sine(256, 4, 0)).max() < step_uv
