"""What ``torch.compile`` has compiled, run as it is written while a loop is traced, and noted.

NOTE on why compiled code is traced as it is written.

1. A dispatch mode makes torch run compiled code as written anyway. Left to itself it also remembers each such function
   as one never to be compiled again, and raises where the function was compiled with ``fullgraph=True``. The stance
   ``force_eager`` does neither: what was compiled before the trace is used again after it.
2. ``torch.cond`` and its like run through a compiler of their own, in eager mode as well; that one is let.
3. What is compiled has no lines to show: an inductor kernel stands for many operations, fused and reordered.
"""

import contextlib
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Self

import torch
from torch import nn

from nanhunt.observe.compiled import keep_uncompiled
from nanhunt.observe.patches import StandIn

_EVAL_FRAME = "torch._dynamo.eval_frame"
# What a compiled function is to whoever calls it.
_COMPILE_WRAPPER = "compile_wrapper"
# What torch puts around a module of its own, and around what is no function.
_WRAPPER_OF_CALLABLES = "wrap_inline.<locals>.inner"


class AsWritten:
    """Runs compiled code as it is written for as long as it is entered, and notes what that was.

    Nothing is imported for it: while ``torch._dynamo`` is not there, only ``torch.compile`` is watched.

    Args:
        own: Code of our own that operations call, to be kept out of what is compiled.

    Attributes:
        names: The functions, and the classes of the modules, that were called although compiled; each once.
    """

    def __init__(self, own: CodeType) -> None:
        self.names: list[str] = []
        self._own = own
        self._seen: dict[int, tuple[str, Any]] = {}
        self._has_begun = False
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        keep_uncompiled(self._own)
        self._begin()
        if not self._has_begun:
            place = StandIn(torch, "compile")

            def compiled(*args: Any, **kwargs: Any) -> Any:
                result = place.inner(*args, **kwargs)
                if place.is_on:
                    self._begin()
                return result

            self._put(place, compiled)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._has_begun = False

    def _put(self, place: StandIn, function: Callable[..., Any]) -> None:
        place.put(function)
        self._undo.append(place.leave)

    def _begin(self) -> None:
        eval_frame: Any = sys.modules.get(_EVAL_FRAME)
        if eval_frame is None or self._has_begun:
            return
        self._has_begun = True
        _STANCE.take()
        self._undo.append(_STANCE.leave)
        if not hasattr(eval_frame, "_callback_from_stance"):
            return
        place = StandIn(eval_frame, "_callback_from_stance")
        thread = threading.get_ident()

        def callback_from_stance(callback: Any) -> Any:
            if callback is None or callback is False or threading.get_ident() != thread or not place.is_on:
                return place.inner(callback)
            # torch.cond and its like are nothing until torch has compiled them. All else is not compiled, whatever
            # stance the program itself takes inside.
            return None if self._name_of(callback, sys._getframe(1)) else callback

        self._put(place, callback_from_stance)

    def _name_of(self, callback: Any, frame: FrameType) -> str:
        """Notes what is about to be called."""
        if id(callback) in self._seen:
            return self._seen[id(callback)][0]
        while frame.f_code.co_name != _COMPILE_WRAPPER and frame.f_back is not None:
            # Another trace stands in front.
            frame = frame.f_back
        name = name_of(frame.f_locals.get("fn"))
        # The callback is kept so that its identity stays.
        self._seen[id(callback)] = name, callback
        if name and name not in self.names:
            self.names.append(name)
        return name


class _Stance:
    """The stance ``force_eager``, for as long as any trace needs it; they may end in any order."""

    def __init__(self) -> None:
        self._num_users = 0
        self._taken: Any = None
        self.is_enough = False

    def take(self) -> None:
        self._num_users += 1
        if self._num_users == 1:
            # Versions of torch before 2.6 have no stances; inside a compiled region none can be taken.
            with contextlib.suppress(AttributeError, RuntimeError):
                self._taken = torch.compiler.set_stance("force_eager")
                self.is_enough = not _is_in_compiled_region(sys._getframe(1))

    def leave(self) -> None:
        self._num_users -= 1
        if self._num_users or self._taken is None:
            return
        taken, self._taken, self.is_enough = self._taken, None, False
        # A stance that the program has taken in the meantime for good is its own.
        if sys.modules[_EVAL_FRAME]._stance is taken.stance:
            taken.__exit__(None, None, None)


_STANCE = _Stance()


def is_stance_enough() -> bool:
    """Whether the stance alone keeps what the program has compiled as written; it does not below compiled code."""
    return _STANCE.is_enough


def _is_in_compiled_region(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != _COMPILE_WRAPPER:
        frame = frame.f_back
    return frame is not None


def name_of(function: Any) -> str:
    """What to call a compiled function; a module goes by its class, and what torch compiles for itself by nothing."""
    name: str = getattr(function, "__qualname__", type(function).__name__)
    if name == _WRAPPER_OF_CALLABLES:
        return name_of(function.__closure__[0].cell_contents)
    for owner in (function, getattr(function, "__self__", None)):
        if isinstance(owner, nn.Module):
            return type(owner).__name__
    is_torchs = (getattr(function, "__module__", "") or "").partition(".")[0] == "torch"
    return "" if is_torchs and name.rpartition(".")[2].startswith("_") else name
