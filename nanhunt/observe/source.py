"""The user's own line: the innermost Python frame that belongs neither to torch nor to nanhunt.

Looking for it happens at every operation that autograd numbers, so a frame is kept as its code object and the position
in it; the line and its text are worked out when somebody asks.
"""

import linecache
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple

import torch

from nanhunt.records.ops import Phase, SourceLine

SKIPPED, LIBRARY, USERS = 0, 1, 2

_TORCH = str(Path(torch.__file__).parent) + "/"
_OWN_FOLDERS = (_TORCH, str(Path(__file__).parents[1]) + "/")
# Code that only passes a call on; a frame in it says nothing about the model.
_MACHINERY = ("contextlib.py", "functools.py", "threading.py")
# Installed packages and the standard library: lines that their users did not write.
_LIBRARIES = tuple(
    {sysconfig.get_paths()[kind] + "/" for kind in ("purelib", "platlib", "stdlib", "platstdlib")} | {"site-packages/"}
)
_ENGINE = (_TORCH + "autograd/graph.py", "_engine_run_backward")
_CHECKPOINT = _TORCH + "utils/checkpoint.py"

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]

KINDS: dict[CodeType, int] = {}


class Place(NamedTuple):
    """A position in code that was running.

    Attributes:
        code: The innermost code that is not torch's; None if there is none.
        position: Offset of the running instruction in it.
        users: The innermost code of the user's own, where ``code`` is that of an installed package.
        users_position: The same in that.
    """

    code: CodeType | None
    position: int = 0
    users: CodeType | None = None
    users_position: int = 0


NOWHERE = Place(None)


def kind_of(code: CodeType) -> int:
    """Whether a frame of this code is worth showing, and whether it is the user's own."""
    kind = KINDS.get(code)
    return kind if kind is not None else _judged(code)


def _judged(code: CodeType) -> int:
    filename = code.co_filename
    is_file = filename.startswith("<ipython") or not filename.startswith("<")
    if not is_file or filename.startswith(_OWN_FOLDERS) or Path(filename).name in _MACHINERY:
        kind = SKIPPED
    elif any(folder in filename for folder in _LIBRARIES):
        kind = LIBRARY
    else:
        kind = USERS
    KINDS[code] = kind
    return kind


def is_users_code(code: CodeType) -> bool:
    """Whether the user wrote it, as far as its place tells."""
    return kind_of(code) == USERS


def user_place(frame: FrameType | None) -> Place:
    """The innermost place outside torch at or above the frame."""
    library: FrameType | None = None
    while frame is not None:
        code = frame.f_code
        kind = KINDS.get(code)
        if kind is None:
            kind = kind_of(code)
        if kind == USERS:
            if library is None:
                return Place(code, frame.f_lasti)
            return Place(library.f_code, library.f_lasti, code, frame.f_lasti)
        if kind == LIBRARY and library is None:
            library = frame
        frame = frame.f_back
    return Place(library.f_code, library.f_lasti) if library is not None else NOWHERE


def applied_place(place: Place, frame: FrameType | None) -> Place:
    """For the forward of an ``autograd.Function``, the place where the function was applied."""
    if place.code is None or place.code.co_name != "forward":
        return place
    while frame is not None and frame.f_code is not place.code:
        frame = frame.f_back
    above = frame.f_back if frame is not None else None
    return user_place(above) if above is not None and above.f_code is _APPLY else place


def place_in_backward(frame: FrameType | None) -> tuple[Literal["engine", "code", "recomputed"], Place]:
    """Who runs an operation during a backward pass: autograd itself, Python code called by it, or a recomputation.

    Code is a gradient hook or the backward of an ``autograd.Function``; its place is given.
    """
    first, found, recomputed = frame, False, False
    while frame is not None:
        code = frame.f_code
        if (code.co_filename, code.co_name) == _ENGINE:
            break
        recomputed = recomputed or code.co_filename == _CHECKPOINT
        found = found or kind_of(code) != SKIPPED
        frame = frame.f_back
    if recomputed:
        return "recomputed", user_place(first)
    return ("code", user_place(first)) if found and frame is not None else ("engine", NOWHERE)


@lru_cache(maxsize=4096)
def source_line(code: CodeType | None, position: int) -> SourceLine | None:
    """The line that was running, with its text as far as the file can still be read."""
    if code is None:
        return None
    line = next((n for first, end, n in code.co_lines() if first <= position < end and n), code.co_firstlineno)
    return SourceLine(code.co_filename, line, linecache.getline(code.co_filename, line).strip(), code.co_name)


def line_of(place: Place, drivers: frozenset[tuple[CodeType, int]] = frozenset()) -> SourceLine | None:
    """The line to show of a place: the user's own, unless it only drives the loop.

    Args:
        place: Where an operation ran.
        drivers: Places of the user's whose call runs the loop itself, such as ``trainer.train()``: what runs below
            them is in a package, and the package's line says more.
    """
    if place.users is not None and (place.users, place.users_position) not in drivers:
        return source_line(place.users, place.users_position)
    return source_line(place.code, place.position)


def user_frame() -> tuple[str, int, str] | None:
    """File, line number and function of the innermost frame outside torch; None if there is none."""
    line = line_of(user_place(sys._getframe(1)))
    return (line.file, line.line, line.function) if line is not None else None


def is_users_function(node: Any) -> bool:
    """Whether the autograd node is an ``autograd.Function`` that torch did not write."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] != "torch"


def function_name(node: Any) -> str:
    """Name of the ``autograd.Function`` whose backward the node runs."""
    return node._forward_cls.__name__


@dataclass(frozen=True, slots=True)
class ForwardSite:
    """Where a forward operation ran; what its backward operations are attributed to."""

    index: int
    op: str
    module: str
    place: Place
    phase: Phase
