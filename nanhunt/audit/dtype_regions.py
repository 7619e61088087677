"""In which autocast region a step is, as operations below autocast cannot tell."""

from typing import Any, Self

import torch

from nanhunt.observe.patches import Patches

_DEVICES = ("cpu", "cuda", "xpu", "mps")


class AutocastRegions:
    """Follows ``torch.autocast`` as it is entered and left.

    Attributes:
        is_on: Whether autocast is on for some device.
        is_switched_off: Whether it is off inside a region where it is on.
    """

    def __init__(self) -> None:
        self._patches = Patches(lambda function, *args, **kwargs: function(*args, **kwargs))
        self._outer: list[bool] = []
        self.is_on = self.is_switched_off = False

    def __enter__(self) -> Self:
        self.is_on = _is_autocast_on()
        self._patches.around(torch.autocast, "__enter__", self._before, self._after)
        self._patches.around(torch.autocast, "__exit__", None, self._left)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patches.undo()

    def _before(self, *args: Any) -> None:
        self._outer.append(_is_autocast_on())

    def _after(self, *args: Any) -> None:
        self._look()

    def _left(self, *args: Any) -> None:
        if self._outer:
            self._outer.pop()
        self._look()

    def _look(self) -> None:
        self.is_on = _is_autocast_on()
        self.is_switched_off = not self.is_on and any(self._outer)


def _is_autocast_on() -> bool:
    return any(torch.is_autocast_enabled(device) for device in _DEVICES)
