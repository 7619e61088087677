"""Writing files whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nanhunt.errors import NanhuntError


def write_text(path: Path, text: str) -> None:
    """Writes the text, in place of what was there.

    Raises:
        NanhuntError: If it cannot be written; what was there before is left as it was.
    """
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes to a temporary file beside the path, flushes it to disk and gives it its name.

    Args:
        path: Where it goes; missing folders are made.
        write: Writes the content.

    Raises:
        NanhuntError: If it cannot be written; what was there before is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            # A device such as /dev/stdout, or a pipe: it cannot be replaced, only written to.
            with path.open("wb") as file:
                write(file)
            return
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
    except OSError as error:
        raise NanhuntError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    """What new files are not allowed; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
