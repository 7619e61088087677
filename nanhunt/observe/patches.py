"""Functions of torch that something is called around, for as long as a loop is followed."""

import functools
from collections.abc import Callable
from typing import Any

Callback = Callable[..., None]


class Patches:
    """Stand-ins for functions and methods; the originals come back, to the identical object.

    Args:
        guarded: Calls what is to be called around, so that its failure never reaches the program.
    """

    def __init__(self, guarded: Callable[..., Any]) -> None:
        self._guarded = guarded
        self._originals: list[tuple[Any, str, Any]] = []

    def around(self, owner: Any, name: str, before: Callback | None, after: Callback | None) -> None:
        """Calls ``before`` and ``after`` with the arguments of every call; ``after`` also where the call raises."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self._guarded(before, *args, **kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                if after is not None:
                    self._guarded(after, *args, **kwargs)

        self._originals.append((owner, name, original))
        setattr(owner, name, stand_in)

    def undo(self) -> None:
        """Puts every original back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)
