"""Stand-ins for functions end in any order, and leave the identical original behind."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from nanhunt.observe.patches import Patches, StandIn


class Base:
    def say(self, word: str) -> str:
        return word


class Derived(Base):
    pass


def stand_in(owner: type, mark: str) -> StandIn:
    """One that puts its mark around what is said."""
    place = StandIn(owner, "say")

    def say(thing: Any, word: str) -> str:
        said = place.inner(thing, word)
        return f"{mark}{said}{mark}" if place.is_on else said

    place.put(say)
    return place


@pytest.fixture(autouse=True)
def left_as_it_was() -> Any:
    original = vars(Base)["say"]
    yield
    assert vars(Base)["say"] is original
    assert "say" not in vars(Derived)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_stand_ins_end_in_any_order(order: tuple[str, ...]):
    places = {mark: stand_in(Base, mark) for mark in "abc"}
    assert Base().say("-") == "cba-abc"

    said = []
    for mark in order:
        places[mark].leave()
        said.append(Base().say("-"))

    left = [[mark for mark in "cba" if mark not in order[: number + 1]] for number in range(3)]
    assert said == ["".join(marks) + "-" + "".join(reversed(marks)) for marks in left]


def test_inherited_method_is_inherited_again():
    upper = stand_in(Derived, "d")
    lower = stand_in(Base, "b")
    assert (Derived().say("-"), Base().say("-")) == ("db-bd", "b-b")

    lower.leave()
    assert Derived().say("-") == "d-d"
    upper.leave()


def test_one_that_has_left_is_let_go_while_another_stays():
    first = stand_in(Base, "a")
    function = vars(Base)["say"]
    second = stand_in(Base, "b")
    first.leave()

    assert vars(Base)["say"].__wrapped__ is not function
    second.leave()


def wrapped(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def say(thing: Any, word: str) -> str:
        return original(thing, word.upper())

    return say


def test_what_others_have_put_over_it_stays_and_it_does_nothing_any_more():
    original, place = Base.say, stand_in(Base, "a")
    Base.say = wrapped(Base.say)
    try:
        place.leave()
        assert Base().say("x") == "X"
        later = stand_in(Base, "b")
        assert Base().say("x") == "bXb"
        later.leave()
    finally:
        Base.say = original


def test_one_over_another_that_has_left_goes_back_to_the_original():
    original, place = Base.say, stand_in(Base, "a")
    function = Base.say
    Base.say = wrapped(function)
    place.leave()
    Base.say = function
    stand_in(Base, "b").leave()

    assert Base.say is original


@pytest.mark.parametrize("is_first", [True, False])
def test_patches_of_two_observers_end_in_any_order(is_first: bool):
    seen: list[str] = []

    def guarded(look: Callable[..., Any], *args: Any) -> None:
        look(*args)

    patches = [Patches(guarded), Patches(guarded)]
    for number, each in enumerate(patches):
        each.around(Base, "say", lambda *args, number=number: seen.append(f"{number}"), None)
        each.replace(Derived, "say", lambda *args, number=number: f"instead {number}")
    assert (Base().say("x"), seen, Derived().say("x")) == ("x", ["1", "0"], "instead 1")

    first, last = patches if is_first else reversed(patches)
    first.undo()
    seen.clear()
    assert (Base().say("x"), seen) == ("x", ["1" if is_first else "0"])
    assert Derived().say("x") == ("instead 1" if is_first else "instead 0")
    last.undo()


def test_patches_under_what_others_have_put_there_do_nothing_any_more():
    original, seen = Base.say, []
    patches = Patches(lambda look, *args: look(*args))
    patches.around(Base, "say", lambda *args: seen.append("before"), lambda *args: seen.append("after"))
    patches.replace(Base, "say", lambda *args: "instead")
    Base.say = wrapped(Base.say)
    try:
        patches.undo()
        assert (Base().say("x"), seen) == ("X", [])
    finally:
        Base.say = original
