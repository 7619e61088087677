"""Where operations stand: phase, module, the user's line, and for backward operations the forward line.

NOTE on how a backward operation finds its forward line.

1. It belongs to the forward operation whose autograd node runs: the first forward operation dispatched after the node
   was numbered, ``_get_sequence_nr() == node._sequence_nr() + 1``.
2. A gradient hook and the backward of an ``autograd.Function`` are Python code that the engine calls: their frames lie
   below that of the engine. The recomputation of a checkpoint lies below one of ``torch.utils.checkpoint``.
"""

import sys
from collections import deque
from itertools import takewhile
from types import CodeType
from typing import Any

import torch

from nanhunt.observe.call import Here
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.op_info import OpTraits
from nanhunt.observe.source import (
    ForwardSite,
    applied_place,
    function_name,
    is_users_function,
    line_of,
    place_in_backward,
    user_place,
)
from nanhunt.records.ops import Phase

MAX_SITES = 100_000
"""Forward operations remembered for their backward operations; a graph kept for longer loses its lines."""

_KEPT_STEPS = 3
"""Steps for which the forward operations are remembered, for graphs that are kept over a step."""

_running_node = torch._C._current_autograd_node


class Sites:
    """Knows where the running operation stands.

    Args:
        path: Says which module is running.

    Attributes:
        number: The autograd number for which the last site was noted.
        phase: The part of the step outside backward passes.
        drivers: Places that only drive the loop; see ``line_of``.
        is_past_backward: Whether a backward pass has ended and no forward pass has begun since.
        has_stepped: Whether an optimizer has stepped since.
    """

    def __init__(self, path: ModulePath) -> None:
        self.number = -1
        self.phase: Phase = "forward"
        self.drivers: frozenset[tuple[CodeType, int]] = frozenset()
        self.is_past_backward = self.has_stepped = False
        self._path = path
        self._sites: dict[int, ForwardSite] = {}
        self._step_numbers: deque[int] = deque(maxlen=_KEPT_STEPS)

    def end_step(self) -> None:
        """Forgets the sites of steps long past."""
        if len(self._step_numbers) == _KEPT_STEPS:
            oldest = self._step_numbers[0]
            for number in list(takewhile(lambda number: number < oldest, self._sites)):
                del self._sites[number]
        self._step_numbers.append(self.number)

    def note_driver(self) -> None:
        """The user's line that is running only drives the loop, if a package stands between it and what is called."""
        place = user_place(sys._getframe(1))
        if place.users is not None:
            self.drivers |= {(place.users, place.users_position)}

    def note(self, number: int, index: int, traits: OpTraits) -> None:
        """Remembers the first operation after each autograd node was numbered (rule 1 of the NOTE)."""
        if number in self._sites:
            return
        node = _running_node()
        if node is not None and not torch.is_grad_enabled():
            return
        # Between here and the operation lie frames of the tracer's own.
        frame = sys._getframe(2)
        if node is not None:
            kind, place = place_in_backward(frame)
            known = self._sites.get(node._sequence_nr() + 1)
            if kind == "engine" and known is not None:
                # A backward pass that is itself differentiated belongs to the forward it differentiates.
                self._sites[number] = known
                return
        else:
            place = applied_place(self._path.place(frame), frame)
        if len(self._sites) >= MAX_SITES:
            for old in list(self._sites)[: MAX_SITES // 2]:
                del self._sites[old]
        self._sites[number] = ForwardSite(index, traits.full_name, self._path.current, place, self.phase)

    def site(self, index: int, traits: OpTraits) -> ForwardSite:
        """Where the running operation stands, to be worked out when somebody asks."""
        place = user_place(sys._getframe(1))
        return ForwardSite(index, traits.full_name, self._path.current, place, self.phase)

    def seen_from(self, site: ForwardSite) -> Here:
        """A site in the terms of a record."""
        return Here(site.phase, site.module, line_of(site.place, self.drivers))

    def here(self) -> Here:
        """Where the running operation stands."""
        node = _running_node()
        frame = sys._getframe(1)
        if node is None or self.phase == "optimizer":
            # An optimizer may step inside the backward pass, from a hook on the gradient.
            line = line_of(user_place(frame), self.drivers)
            between: Any = ""
            if self.is_past_backward and self._path.is_outside and self.phase == "forward":
                between = "after the step" if self.has_stepped else "before the step"
            return Here(self.phase, self._path.current, line, between=between)
        kind, place = place_in_backward(frame)
        if kind == "recomputed":
            return Here("forward", self._path.current, line_of(place, self.drivers), recomputed=True)
        site = self._sites.get(node._sequence_nr() + 1)
        line = line_of(site.place, self.drivers) if site is not None else None
        own = line_of(place, self.drivers) if kind == "code" else None
        module = site.module if site is not None else self._path.module_of(getattr(node, "variable", None))
        if own is not None and not is_users_function(node):
            # A hook: what it computes comes from its own line, not from the one it hangs on.
            return Here("backward", module, own)
        index, op = (site.index, site.op) if site is not None else (None, None)
        if is_users_function(node):
            op = function_name(node)
        if line is None and kind == "engine":
            # The sum of a parameter's gradients has no forward line; the backward pass that adds to it has one.
            line = line_of(user_place(frame), self.drivers)
        return Here("backward", module, line, forward_index=index, forward_op=op, own_backward=own)
