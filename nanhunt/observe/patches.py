"""Functions of torch that are stood in for, for as long as a loop is followed."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from nanhunt.observe.compiled import code_of, keep_uncompiled

Callback = Callable[..., None]


class StandIn:
    """A place in front of a function or method, which can be left in any order, whoever else stands there.

    Args:
        owner: The class or module that has the function; a class may also inherit it.
        name: Its name there.

    Attributes:
        inner: What is stood in for: the original, or another stand-in. The function that was put here calls it.
        is_on: Whether it still stands. Code that is not ours may hold the function for longer; it must do nothing then
            but call ``inner``.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.is_on: bool = False
        self.inner: Callable[..., Any] = getattr(owner, name) if name in vars(owner) else _Inherited(owner, name)
        while (below := _stand_in_of(self.inner)) is not None and not below.is_on:
            self.inner = below.inner
        self._owner, self._name = owner, name
        # The function holds this, and what holds each other is not let go at once.
        self._function: Callable[[], Any] = lambda: None

    def put(self, function: Callable[..., Any]) -> None:
        """Begins to stand there; the function looks like the original, and ``torch.compile`` looks past it."""
        functools.update_wrapper(function, getattr(self._owner, self._name))
        vars(function)["_nanhunt_stand_in"] = self
        keep_uncompiled(code_of(function), callees=False)
        self._function, self.is_on = weakref.ref(function), True
        setattr(self._owner, self._name, function)

    def leave(self) -> None:
        """Ends it; once all have left, the original is back, the identical object."""
        self.is_on = False
        own, standing = self._function(), vars(self._owner).get(self._name)
        if standing is own:
            if isinstance(self.inner, _Inherited):
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self.inner)
            return
        while (upper := _stand_in_of(standing)) is not None:
            if upper.inner is own:
                upper.inner = self.inner
                # It would hold on to the function that has left.
                vars(standing)["__wrapped__"] = self.inner
                return
            standing = upper.inner


class _Inherited:
    """A method as a class inherits it at the moment it is called: a stand-in may come and go there as well."""

    def __init__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, thing: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(self._owner, thing), self._name)(*args, **kwargs)


def _stand_in_of(function: Any) -> StandIn | None:
    """What put the function there; None for an original and for what others have put there."""
    found = getattr(function, "_nanhunt_stand_in", None)
    # What is wrapped around a function takes over its attributes.
    return found if found is not None and found._function() is function else None


class Patches:
    """Stand-ins for functions and methods that end together.

    Args:
        guarded: Calls what is to be called around, so that its failure never reaches the program.
    """

    def __init__(self, guarded: Callable[..., Any]) -> None:
        self._guarded = guarded
        self._standing: list[StandIn] = []

    def around(self, owner: Any, name: str, before: Callback | None, after: Callback | None) -> None:
        """Calls ``before`` and ``after`` with the arguments of every call; ``after`` also where the call raises."""
        place = StandIn(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if not place.is_on:
                return place.inner(*args, **kwargs)
            if before is not None:
                self._guarded(before, *args, **kwargs)
            try:
                return place.inner(*args, **kwargs)
            finally:
                if after is not None:
                    self._guarded(after, *args, **kwargs)

        self._put(place, function)

    def replace(self, owner: Any, name: str, instead: Callable[..., Any]) -> None:
        """Calls ``instead`` in the place of the function."""
        place = StandIn(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            return (instead if place.is_on else place.inner)(*args, **kwargs)

        self._put(place, function)

    def _put(self, place: StandIn, function: Callable[..., Any]) -> None:
        place.put(function)
        self._standing.append(place)

    def undo(self) -> None:
        """Ends them all."""
        while self._standing:
            self._standing.pop().leave()
