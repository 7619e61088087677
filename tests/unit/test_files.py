"""Files are written whole or not at all; what cannot be replaced is written to."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from nanhunt.errors import NanhuntError
from nanhunt.files import write_text, write_whole


def refusal(path, write=None):
    with pytest.raises(NanhuntError) as caught:
        write_whole(path, write or (lambda file: file.write(b"new")))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_text_is_written_in_missing_folders(tmp_path):
    file = tmp_path / "a" / "b" / "report.txt"
    write_text(file, "two\nlines \u00fc\n")
    assert file.read_bytes() == b"two\nlines \xc3\xbc\n"
    assert [path.name for path in file.parent.iterdir()] == ["report.txt"]


def test_file_that_is_there_is_replaced_whole(tmp_path):
    file = tmp_path / "report.txt"
    file.write_text("a much longer text than the other one\n")
    with file.open() as before:
        write_text(file, "short\n")
        assert before.read() == "a much longer text than the other one\n"
    assert file.read_text() == "short\n"


def test_file_is_as_readable_as_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_name_that_is_no_text_does_not_keep_the_rest_from_being_written(tmp_path):
    write_text(tmp_path / "x", "replay of \udcff.pt\n")
    assert (tmp_path / "x").read_text() == "replay of \\udcff.pt\n"


# Failures


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["os.fsync", "write", "replace"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, place):
    file = tmp_path / "report.txt"
    file.write_text("old\n")
    if place == "os.fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    elif place == "replace":
        monkeypatch.setattr("pathlib.Path.replace", no_space)
    message = refusal(file, no_space if place == "write" else None)
    assert message == f"cannot write {file}: No space left on device"
    assert file.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("ours")])
def test_writer_that_fails_leaves_what_was_there_and_its_error(tmp_path, error):
    file = tmp_path / "report.txt"
    file.write_text("old\n")

    def fail(opened):
        opened.write(b"half")
        raise error

    with pytest.raises((KeyboardInterrupt, ValueError)):
        write_whole(file, fail)
    assert file.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def test_process_that_is_killed_leaves_what_was_there(tmp_path):
    file = tmp_path / "report.txt"
    file.write_text("old\n")
    lines = [
        "import os, pathlib, sys",
        "from nanhunt.files import write_whole",
        "def die(file): file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)",
        "write_whole(pathlib.Path(sys.argv[1]), die)",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines), str(file)]).returncode == -9
    assert file.read_text() == "old\n"


def test_what_is_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder") == f"cannot write {tmp_path / 'folder'}: Is a directory"
    assert refusal(tmp_path / "file" / "x").startswith(f"cannot write {tmp_path / 'file' / 'x'}: ")
    assert refusal(tmp_path / ("x" * 300)) == f"cannot write {tmp_path / ('x' * 300)}: File name too long"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr("tempfile.mkstemp", denied)
    assert refusal(tmp_path / "x") == f"cannot write {tmp_path / 'x'}: Permission denied"


# Links, devices, pipes


def test_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "real.txt").write_text("old\n")
    (tmp_path / "latest.txt").symlink_to("kept/real.txt")
    (tmp_path / "broken.txt").symlink_to("kept/absent.txt")
    for name, real in (("latest.txt", "real.txt"), ("broken.txt", "absent.txt")):
        write_text(tmp_path / name, "new\n")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "kept" / real).read_text() == "new\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.txt", "kept", "latest.txt"]


def test_device_is_written_to_and_stays_one(tmp_path):
    write_text(type(tmp_path)("/dev/null"), "gone\n")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through\n")
    reader.join(10)
    assert read == ["through\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


WRITES_TWICE = """
import sys
from pathlib import Path
from nanhunt.files import write_text
print("before")
write_text(Path(sys.argv[1]), "report\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_in_a_file_is_written_on_and_stays_what_it_is(tmp_path, name):
    link = os.readlink("/dev/stdout")
    file = tmp_path / "out.txt"
    file.write_text("first\n")
    with file.open("a") as out:
        subprocess.run([sys.executable, "-c", WRITES_TWICE, name], stdout=out, check=True)
    assert file.read_text() == "first\nbefore\nreport\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    assert os.readlink("/dev/stdout") == link


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr"])
def test_standard_streams_in_a_pipe_are_written_to(name):
    done = subprocess.run([sys.executable, "-c", WRITES_TWICE, name], capture_output=True, text=True, check=True)
    expected = ("before\nreport\nafter\n", "") if name == "/dev/stdout" else ("before\nafter\n", "report\n")
    assert (done.stdout, done.stderr) == expected


def test_stream_that_is_not_open_is_said():
    lines = ["from pathlib import Path", "from nanhunt.files import write_text", "write_text(Path('/dev/fd/77'), 'x')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("NanhuntError: cannot write /dev/fd/77: Bad file descriptor")
