"""The user's own line: the innermost Python frame that belongs neither to torch nor to nanhunt."""

import linecache
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nanhunt.records.ops import Phase, SourceLine

_OWN_FOLDERS = (
    str(Path(torch.__file__).parent) + "/",
    str(Path(__file__).parents[1]) + "/",
)
# Code that only passes a call on; a frame in it says nothing about the model.
_MACHINERY = ("contextlib.py", "functools.py", "threading.py")


@cache
def _is_users(filename: str) -> bool:
    """Whether a frame of this file is worth showing."""
    if filename.startswith("<") and not filename.startswith("<ipython"):
        return False
    return not filename.startswith(_OWN_FOLDERS) and Path(filename).name not in _MACHINERY


def user_frame(depth: int = 1) -> tuple[str, int, str] | None:
    """File, line number and function of the innermost user frame above the caller; None if there is none."""
    frame = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def source_line(frame: tuple[str, int, str] | None) -> SourceLine | None:
    """The frame with its text, as far as the file can still be read."""
    if frame is None:
        return None
    file, line, function = frame
    return SourceLine(file, line, linecache.getline(file, line).strip(), function)


def own_backward_line(node: Any) -> SourceLine | None:
    """The running line of a backward that the user wrote; None if the autograd node is torch's own."""
    function = getattr(node, "_forward_cls", None)
    if function is None or function.__module__.partition(".")[0] == "torch":
        return None
    return source_line(user_frame())


@dataclass
class ForwardSite:
    """Where a forward operation ran; what its backward operations are attributed to."""

    index: int
    op: str
    module: str
    frame: tuple[str, int, str] | None
    phase: Phase

    @property
    def line(self) -> SourceLine | None:
        """The user's line."""
        return source_line(self.frame)
