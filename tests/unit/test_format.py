"""Capture files: what goes in comes out, and a write is whole or not at all."""

import contextlib
import enum
import errno
import os
import resource
import signal
import stat
import warnings
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_files import capture, same
from torch import nn

from nanhunt.capture.format import checksum, read_capture, write_capture
from nanhunt.errors import CaptureError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.complex128]


# What goes in comes out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)
    back = read_capture(write_capture(capture(tensor), tmp_path)).batches[0]
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_non_finite_values_and_the_sign_of_zero_survive(tmp_path):
    values = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-45]
    back = read_capture(write_capture(capture(torch.tensor(values)), tmp_path)).batches[0]
    assert [str(value) for value in back.tolist()] == ["nan", "inf", "-inf", "-0.0", "1.401298464324817e-45"]


def test_nested_containers_come_back_with_their_types(tmp_path):
    content = {
        "a": [torch.arange(3), (torch.tensor(1.5), {"deep": [torch.zeros(0, 2)]})],
        "b": (True, None, -7, 2**70, 0.1, float("inf"), "µV", b"\x00\xff", torch.bfloat16, torch.device("cpu")),
        3: {(1, "x"): "tuples and numbers are keys", None: [], False: ()},
        "empty": {},
    }
    back = read_capture(write_capture(capture(content, config={"lr": 1e-3}), tmp_path))
    assert same(content, back.batches[0])
    assert back.step == 19
    assert back.meta == {"step": 19, "target": None, "config": {"lr": 1e-3}}
    assert not back.is_legacy
    assert not back.has_state


def test_what_is_no_plain_container_becomes_one(tmp_path):
    pair = namedtuple("pair", "left right")
    colour = enum.Enum("colour", {"RED": "red"}, type=str)
    content = {
        "named": pair(1, torch.ones(1)),
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, b=[2]),
        "user": UserDict(c=3),
        "set": {4},
        "size": torch.Size([2, 3]),
        "parameter": nn.Parameter(torch.ones(2)),
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
        "numbers": [np.float64(0.5), np.float32(0.5), np.int64(5), np.bool_(True), np.str_("s")],
        "enum": [enum.IntEnum("level", {"HIGH": 9}).HIGH, colour.RED],
        np.int64(6): np.float64(7),
    }
    expected = {
        "named": (1, torch.ones(1)),
        "ordered": {"a": 1},
        "default": {"b": [2]},
        "user": {"c": 3},
        "set": [4],
        "size": (2, 3),
        "parameter": torch.ones(2),
        "numpy": torch.arange(6, dtype=torch.int16).reshape(2, 3),
        "numbers": [0.5, 0.5, 5, True, "s"],
        "enum": [9, "red"],
        6: 7.0,
    }
    assert same(expected, read_capture(write_capture(capture(content), tmp_path)).batches[0])


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(4.0)[::2][:1],
        torch.ones(1).expand(3, 2),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(8.0)[1::3],
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(2, requires_grad=True) * 2,
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(2).as_subclass(Tagged),
    ],
    ids=["one strided", "expanded", "transposed", "strided", "conj", "imag", "one imag", "graph", "last", "subclass"],
)
def test_views_are_stored_as_tensors_of_their_own(tmp_path, tensor):
    back = read_capture(write_capture(capture(tensor), tmp_path)).batches[0]
    assert type(back) is torch.Tensor
    assert torch.equal(back, tensor.detach().resolve_conj().resolve_neg())
    assert checksum(back) == checksum(tensor)
    assert back.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_sparse_tensor_comes_back(tmp_path):
    back = read_capture(write_capture(capture(torch.eye(3).to_sparse()), tmp_path)).batches[0]
    assert torch.equal(back.to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "array", [np.arange(3.0)[::-1], np.arange(3, dtype=">f4"), np.broadcast_to(np.float64(1), (3,)), np.array(5)]
)
def test_any_numeric_array_is_stored(tmp_path, array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_capture(write_capture(capture(array), tmp_path)).batches[0]
    assert back.tolist() == array.tolist()


def test_the_checksum_tells_dtype_shape_and_values_apart():
    ones = torch.ones(2, 3)
    others = [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.int32), torch.ones(6), torch.zeros(2, 3)]
    assert len({checksum(tensor) for tensor in [ones, *others]}) == 5
    assert checksum(ones) == checksum(torch.ones(3, 2).t())
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"x": [1, {"y": object()}]}, "batches.0.x.1.y", "object"),
        ({"x": Path("a.edf")}, "batches.0.x", "PosixPath"),
        ({"x": 1 + 2j}, "batches.0.x", "complex"),
        ({"x": lambda: None}, "batches.0.x", "function"),
        ({"x": np.array(["Fp1"])}, "batches.0.x", "ndarray"),
        ({"x": np.array([object()])}, "batches.0.x", "ndarray"),
        ({"x": np.datetime64("2026-01-01")}, "batches.0.x", "date"),
        ({"x": torch.empty(2, device="meta")}, "batches.0.x", "Tensor"),
        ({frozenset({1}): 1}, "batches.0.frozenset({1})", "frozenset"),
        ({"x": nn.Linear(1, 1)}, "batches.0.x", "Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_with_its_path(value, path, kind):
    with pytest.raises(CaptureError) as caught:
        capture(value)
    assert str(caught.value).startswith(f"cannot store a {kind} at {path}")
    assert "\n" not in str(caught.value)


def test_a_description_that_is_not_json_is_refused_in_one_line(tmp_path):
    with pytest.raises(CaptureError, match="cannot store the description of the step: Object of type set"):
        write_capture(capture(torch.ones(1), config={"layers": {1, 2}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Whole or not at all


def test_a_capture_is_never_written_over_another(tmp_path):
    paths = [write_capture(capture(torch.full((1,), float(number))), tmp_path) for number in range(3)]
    assert [path.name for path in paths] == ["bad_batch_000019.pt", "bad_batch_000019-1.pt", "bad_batch_000019-2.pt"]
    assert [read_capture(path).batches[0].item() for path in paths] == [0.0, 1.0, 2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_a_file_system_without_hard_links_works_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    paths = [write_capture(capture(torch.full((1,), float(number))), tmp_path) for number in range(2)]
    assert [path.name for path in paths] == ["bad_batch_000019.pt", "bad_batch_000019-1.pt"]
    assert [read_capture(path).batches[0].item() for path in paths] == [0.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 2

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CaptureError, match="Operation not permitted"):
        write_capture(capture(torch.ones(1)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 960\nvs 854")])
def test_a_failing_write_leaves_nothing_and_says_why_in_one_line(tmp_path, monkeypatch, broken, error):
    def fail(*args, **kwargs):
        if broken == "torch.save":
            args[1].write(b"PK half a file")
        raise error

    monkeypatch.setattr(broken, fail)
    with pytest.raises(CaptureError) as caught:
        write_capture(capture(torch.ones(3)), tmp_path)
    said = getattr(error, "strerror", None) or "unexpected pos 960"
    assert caught.value.message == f"cannot write the capture to {tmp_path}: {said}"
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def file_size_limit(limit) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 1_000, 30_000, 40_500])
def test_a_disk_that_fills_up_during_the_write_leaves_nothing(tmp_path, limit):
    whole = capture([torch.ones(5_000), torch.ones(5_000)])
    with file_size_limit(limit), pytest.raises(CaptureError) as caught:
        write_capture(whole, tmp_path)
    assert caught.value.message == f"cannot write the capture to {tmp_path}: File too large"
    assert list(tmp_path.iterdir()) == []
    assert write_capture(whole, tmp_path).stat().st_size > 40_500


def test_a_folder_that_cannot_be_flushed_does_not_undo_the_capture(tmp_path, monkeypatch):
    flush = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert read_capture(write_capture(capture(torch.ones(1)), tmp_path)).step == 19


def test_a_folder_that_is_a_file_is_said_so(tmp_path):
    (tmp_path / "debug").write_text("")
    with pytest.raises(CaptureError, match="debug: File exists"):
        write_capture(capture(torch.ones(1)), tmp_path / "debug")


@pytest.mark.parametrize("point", ["half written", "before flush", "before the name is given"])
def test_a_killed_process_leaves_no_capture_file(tmp_path, point):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save = torch.save

        def stop(*args, **kwargs):
            os.write(writing, b"x")
            signal.pause()

        def half(content, file):
            save(content, file)
            file.truncate(file.tell() // 2)
            stop()

        if point == "half written":
            torch.save = half
        else:
            setattr(os, {"before flush": "fsync"}.get(point, "link"), stop)
        write_capture(capture(torch.ones(100)), tmp_path)
        os._exit(0)
    assert os.read(reading, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reading)
    os.close(writing)
    assert list(tmp_path.glob("bad_batch*")) == []
    # What is left does not stand in the way of the next one.
    assert write_capture(capture(torch.ones(1)), tmp_path).name == "bad_batch_000019.pt"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_rights_of_the_file_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_capture(capture(torch.ones(1)), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
