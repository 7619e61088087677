"""Writing files whole or not at all."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nanhunt.errors import NanhuntError

_STANDARD = {"stdout": 1, "stderr": 2}
_OPEN_FILE = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/([0-9]+)")


def write_text(path: Path, text: str) -> None:
    """Writes the text, in place of what was there.

    Raises:
        NanhuntError: If it cannot be written; what was there before is left as it was.
    """
    # Names of files come from outside and may hold what is no text.
    data = text.encode("utf-8", errors="backslashreplace")
    write_whole(path, lambda file: file.write(data))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes to a temporary file beside the path, flushes it to disk and gives it its name.

    What cannot be replaced is written to: a device, a pipe, and what the process has open, such as ``/dev/stdout``.

    Args:
        path: Where it goes; missing folders are made. A link stays, and what it leads to is replaced.
        write: Writes the content.

    Raises:
        NanhuntError: If it cannot be written; what was there before is left as it was.
    """
    try:
        opened = _OPEN_FILE.fullmatch(str(path))
        if opened:
            name, number = opened.groups()
            _write_open(_STANDARD[name] if name else int(number), write)
        elif path.exists() and not path.is_file():
            with path.open("wb") as file:
                write(file)
        else:
            _replace(Path(os.path.realpath(path)), write)
    except OSError as error:
        raise NanhuntError(f"cannot write {path}: {error.strerror or error}") from error


def _write_open(descriptor: int, write: Callable[[IO[bytes]], object]) -> None:
    """Writes after what was written so far: opening it by its name again would begin at its first byte."""
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(os.dup(descriptor), "wb") as file:
        write(file)


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".nanhunt-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """What new files are not allowed; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
