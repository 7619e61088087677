"""Files that are no captures, or no longer: one line says why, nothing in them is run, nothing ends in a traceback."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from capture_files import capture, refusal, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nanhunt.capture.checkpoint import read_checkpoint
from nanhunt.capture.format import Capture, load_archive, read_capture, write_capture
from nanhunt.errors import CaptureError


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    content = {"windows": torch.linspace(0, 1, 64), "labels": torch.tensor([0.0, 1.0]), "sources": ["night", "day"]}
    whole = capture(content, target={"name": "detector.small", "config": {"lr": 1e-3}}, note="x" * 40)
    return write_capture(whole, tmp_path_factory.mktemp("whole")).read_bytes()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_called_truncated(tmp_path, whole_file, share):
    path = tmp_path / "bad_batch_000019.pt"
    path.write_bytes(whole_file[: max(2, int(len(whole_file) * share))])
    assert "bad_batch_000019.pt is truncated or damaged" in refusal(path)


@pytest.mark.parametrize(("tensor", "name"), [(0, "batches.0.windows"), (1, "batches.0.labels")])
def test_a_flipped_bit_in_a_tensor_is_found_and_the_tensor_named(tmp_path, whole_file, tensor, name):
    path = tmp_path / "x.pt"
    path.write_bytes(whole_file)
    with zipfile.ZipFile(path) as archive:
        entry = next(item for item in archive.infolist() if item.filename.endswith(f"/data/{tensor}"))
        values = archive.read(entry)
    assert whole_file.count(values) == 1
    damaged = bytearray(whole_file)
    damaged[whole_file.index(values) + 6] ^= 1
    path.write_bytes(damaged)
    assert f"x.pt is damaged: the checksum of {name} does not match its values" in refusal(path)


@pytest.mark.parametrize(("there", "instead"), [(b"0.001", b"0.002"), (b"night", b"nighs"), (b"small", b"smalt")])
def test_a_changed_description_or_word_is_found(tmp_path, whole_file, there, instead):
    path = tmp_path / "x.pt"
    assert whole_file.count(there) == 1
    path.write_bytes(whole_file.replace(there, instead))
    assert "x.pt is damaged: its description cannot be read" in refusal(path)


def rewrite(path: Path, **changed) -> Path:
    """The file's content with some keys replaced; None takes a key away."""
    content = torch.load(path, weights_only=True) | changed
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def test_paths_that_read_alike_are_all_checked(tmp_path):
    path = write_capture(capture({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}), tmp_path)
    assert same(read_capture(path).batches[0], {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    payload = {"batches": [{"a.b": torch.full((1,), 5.0), "a": {"b": torch.zeros(1)}}]}
    assert "the checksum of batches.0.a.b does not match" in refusal(rewrite(path, payload=payload))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nanhunt_capture": 2}, "has capture format 2; this nanhunt reads up to 1; update nanhunt"),
        ({"nanhunt_capture": torch.ones(2)}, "is damaged: its description cannot be read"),
        ({"nanhunt_capture": "one"}, "is damaged: its description cannot be read"),
        ({"meta": None}, "is damaged: its description cannot be read"),
        ({"payload": None}, "is damaged: its description cannot be read"),
        ({"payload": [1, 2]}, "is damaged: its description cannot be read"),
        ({"meta": "{"}, "is damaged: its description cannot be read"),
        ({"meta": "[]"}, "is damaged: its description cannot be read"),
        ({"meta": "[" * 100_000}, "is damaged: its description cannot be read"),
        ({"meta": torch.ones(1)}, "is damaged: its description cannot be read"),
        ({"checksum": "0" * 32}, "is damaged: its description cannot be read"),
    ],
)
def test_a_capture_with_parts_missing_or_wrong_is_refused(tmp_path, changed, said):
    path = rewrite(write_capture(capture(torch.ones(1)), tmp_path), **changed)
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("meta", "payload"),
    [
        ({}, {}),
        ({"step": "19"}, {}),
        ({"step": 1.5}, {}),
        ({"step": True}, {}),
        ({"step": 19, "target": "os:system"}, {}),
        ({"step": 19, "checksums": []}, {}),
        ({"step": 19}, {"batches": 5}),
        ({"step": 19}, {"calls": {"a": 1}}),
        ({"step": 19}, {"model": [1]}),
        ({"step": 19}, {"model": {"weight": 1.0}}),
    ],
)
def test_a_forged_capture_that_no_reader_could_use_is_refused(tmp_path, meta, payload):
    path = tmp_path / "forged.pt"
    text = json.dumps({"checksums": {}, **meta})
    torch.save({"nanhunt_capture": 1, "meta": text, "payload": payload}, path)
    assert "forged.pt is damaged: its description cannot be read" in refusal(path)


def test_a_tensor_that_was_taken_out_or_put_in_is_named(tmp_path):
    path = write_capture(capture({"a": torch.ones(1)}), tmp_path)
    text = torch.load(path, weights_only=True)["meta"]
    for payload in ({"batches": [{}]}, {"batches": [{"b": torch.ones(1), "a": torch.ones(1)}]}):
        torch.save({"nanhunt_capture": 1, "meta": text, "payload": payload}, path)
        assert "the checksum of batches.0." in refusal(path)


class Runs:
    """Pickled as a call of ``os.system``."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("form", ["torch.save", "raw pickle", "inside a capture"])
def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path, form):
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(Runs(witness)))
        said = "evil.pt is not an archive written by torch.save"
    else:
        extra = Runs(witness)
        torch.save(extra if form == "torch.save" else {"nanhunt_capture": 1, "meta": "{}", "payload": extra}, path)
        said = "evil.pt holds code or objects, not only tensors and plain data; refused without running it"
    assert said in refusal(path)
    with pytest.raises(CaptureError):
        read_checkpoint(path)
    assert not witness.exists()
    # The payload would have worked: without the refusal it runs.
    pickle.loads(pickle.dumps(Runs(witness)))
    assert witness.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    assert "model.pt holds code or objects" in refusal(tmp_path / "model.pt")


def test_compressed_entries_are_refused(tmp_path, whole_file):
    (tmp_path / "x.pt").write_bytes(whole_file)
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert "y.pt is not written by torch.save: it has compressed entries" in refusal(tmp_path / "y.pt")


def test_an_entry_marked_as_a_folder_is_refused(tmp_path, whole_file):
    # torch.load would leave such an entry's memory as it found it: other values at every reading.
    entry = whole_file.rindex(b"PK\x01\x02", 0, whole_file.rindex(b"archive/data/0"))
    damaged = bytearray(whole_file)
    damaged[entry + 38] |= 0x10
    (tmp_path / "x.pt").write_bytes(damaged)
    assert "x.pt is damaged: an entry is marked as a folder" in refusal(tmp_path / "x.pt")


def test_what_is_no_capture_is_named_for_what_it_is(tmp_path):
    assert f"no such file: {tmp_path / 'none.pt'}" in refusal(tmp_path / "none.pt")
    assert "is a folder" in refusal(tmp_path)
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "empty.pt is empty" in refusal(tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("windows, labels\n")
    assert "text.pt is not an archive written by torch.save" in refusal(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "text")
    assert "other.zip is damaged" in refusal(tmp_path / "other.zip")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is no regular file" in refusal(tmp_path / "pipe")
    for content, said in [
        ({"weight": torch.ones(1), "bias": torch.ones(1)}, "is not a capture: it holds bias, weight"),
        ([1, 2], "is not a capture: it holds a list"),
        ({}, "is not a capture: it holds nothing"),
        ({"windows": 1, "labels": 2}, "is not a capture: it holds labels, windows"),
    ]:
        torch.save(content, tmp_path / "other.pt")
        assert f"other.pt {said}" in refusal(tmp_path / "other.pt")


def test_a_checkpoint_is_a_dict_of_named_tensors(tmp_path):
    path = tmp_path / "last.pt"
    weights = {"weight": torch.ones(1)}
    wrappings = [weights, {"model_state_dict": weights, "step": 3}, {"state_dict": weights}, {"model": weights}]
    for content in [*wrappings, {"module.weight": torch.ones(1)}]:
        torch.save(content, path)
        assert same(read_checkpoint(path), weights)
    for content in [{0: torch.ones(1)}, {"weight": 1.0}, {}, [torch.ones(1)], {"state_dict": {}}]:
        torch.save(content, path)
        with pytest.raises(CaptureError, match=r"last\.pt holds no model weights"):
            read_checkpoint(path)


# The legacy form


def test_the_legacy_form_is_a_batch_only(tmp_path):
    path = tmp_path / "bad_batch_000019.pt"
    torch.save({"windows": torch.ones(2, 19, 8), "labels": torch.zeros(2, 8), "global_step": 19}, path)
    legacy = read_capture(path)
    assert legacy.is_legacy
    assert legacy.step == 19
    assert not legacy.has_state
    assert same(legacy.batches, [{"windows": torch.ones(2, 19, 8), "labels": torch.zeros(2, 8)}])


@pytest.mark.parametrize(
    ("stored", "step"),
    [(torch.tensor(7), 7), (7.0, 7), (torch.ones(3), 0), (float("nan"), 0), (float("inf"), 0), (None, 0), ([], 0)],
)
def test_a_legacy_step_that_is_no_number_counts_as_zero(tmp_path, stored, step):
    torch.save({"windows": torch.ones(1), "labels": torch.ones(1), "global_step": stored}, tmp_path / "x.pt")
    assert read_capture(tmp_path / "x.pt").step == step


def test_a_legacy_file_without_a_step_loads(tmp_path):
    torch.save({"windows": torch.ones(1), "labels": torch.ones(1)}, tmp_path / "x.pt")
    assert read_capture(tmp_path / "x.pt").step == 0


# Any bytes at all

fuzzed = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_or_refuse(path: Path, raw: bytes) -> Capture | None:
    """A capture that holds together, or one line of refusal; anything else is a failure."""
    path.write_bytes(raw)
    try:
        loaded = read_capture(path)
    except CaptureError:
        assert "\n" not in refusal(path)
        return None
    assert isinstance(loaded.step, int)
    assert isinstance(loaded.batches, list)
    assert loaded.has_state in (True, False)
    return loaded


@fuzzed
@given(raw=st.binary(max_size=300), head=st.sampled_from([b"", b"PK", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02"]))
def test_random_bytes_are_refused(tmp_path, raw, head):
    assert read_or_refuse(tmp_path / "x.pt", head + raw) is None


@fuzzed
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(tmp_path, whole_file, share):
    assert read_or_refuse(tmp_path / "x.pt", whole_file[: int(len(whole_file) * share)]) is None


@fuzzed
@given(share=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_one_changed_byte_is_refused_or_changes_nothing(tmp_path, whole_file, share, value):
    damaged = bytearray(whole_file)
    damaged[int(len(whole_file) * share)] ^= value
    changed = read_or_refuse(tmp_path / "y.pt", bytes(damaged))
    if changed is not None:
        whole = read_or_refuse(tmp_path / "x.pt", whole_file)
        assert changed.meta == whole.meta
        assert same(changed.payload, whole.payload)


@fuzzed
@given(
    start=st.floats(0, 1, exclude_max=True), length=st.integers(0, 200), raw=st.binary(max_size=200), tail=st.booleans()
)
def test_any_mutation_is_refused_or_a_capture(tmp_path, whole_file, start, length, raw, tail):
    offset = int(len(whole_file) * start)
    # The pickle and the list of entries are where a change can mean something; they lie at the two ends.
    offset = len(whole_file) - 1 - offset // 4 if tail else offset // 2
    read_or_refuse(tmp_path / "x.pt", whole_file[:offset] + raw + whole_file[offset + length :])


@fuzzed
@given(start=st.integers(0, 2_000), value=st.binary(min_size=1, max_size=8))
def test_any_change_of_the_pickle_is_refused_or_a_capture(tmp_path, whole_file, start, value):
    path = tmp_path / "x.pt"
    path.write_bytes(whole_file)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    offset = start % len(entries[name])
    entries[name] = entries[name][:offset] + value + entries[name][offset + len(value) :]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    read_or_refuse(path, path.read_bytes())


def test_the_loader_never_asks_for_more_than_plain_data(tmp_path, monkeypatch):
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs))
    load_archive(write_capture(capture(torch.ones(1)), tmp_path))
    assert asked == [{"map_location": "cpu", "weights_only": True}]
