"""What the module tracer keeps: the calls of modules, and what was seen of the tensors that went in and out."""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.observe.finite import can_hold_nonfinite, is_finite, stored_values, unreadable_kind

FINITE, NEGATIVE_INFINITY, INFINITY, NAN = range(4)
"""What a tensor holds at worst. NEGATIVE_INFINITY: of non-finite values -inf alone, which masks are made of."""

_SUMMED = frozenset((torch.float32, torch.float64, torch.bfloat16))
"""Types whose sum is cheap and overflows only where values are huge; others are looked at in full."""

_MAX_DEPTH = 6
"""Containers inside containers that are searched for tensors."""

_ATOMS = frozenset((type(None), bool, int, float, str))

# A kind, or the smallest and largest value where they are on a device that is read at a fault only.
Seen = int | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Traced:
    """A module: ``acts`` if its gradients are looked at, ``hands_on`` if its output stands for its input."""

    module: nn.Module
    name: str
    acts: bool
    hands_on: bool

    def has_finite_state(self) -> bool:
        """Whether its own parameters and buffers are finite."""
        own = (*self.module.parameters(recurse=False), *self.module.buffers(recurse=False))
        return all(is_finite(tensor) for tensor in own if unreadable_kind(tensor) is None)


class Call:
    """One call of a module: what went in and came out, and the call it happened in."""

    __slots__ = ("has_returned", "inputs", "is_again", "outputs", "parent", "traced")

    def __init__(self, traced: "Traced", parent: "Call | None", is_again: bool) -> None:
        self.traced, self.parent, self.is_again = traced, parent, is_again
        self.inputs: list[Look] = []
        self.outputs: list[Look] = []
        self.has_returned = False

    @property
    def name(self) -> str:
        """Path of its module."""
        return self.traced.name

    def is_inside(self, other: "Call") -> bool:
        """Whether it happened during the other."""
        call = self.parent
        while call is not None and call is not other:
            call = call.parent
        return call is not None

    @property
    def is_bad(self) -> bool:
        """Whether it ended in an error or in something non-finite."""
        return not self.has_returned or any(output.value for output in self.outputs)


class Look:
    """A tensor, and what was seen of it and of its gradient.

    ``maker`` is the innermost call that made it, its own code included, and ``home`` the call in whose code it turned
    up; both None for what the loop made. ``place`` is where it is used: its home, or further out where it was handed
    on. ``takers`` are the calls it was given to, ``givers`` the modules that handed it on in another form.
    ``gradient`` is None if none came or none was looked at.
    """

    __slots__ = (
        "givers",
        "gradient",
        "has_gradient",
        "home",
        "is_watched",
        "maker",
        "number",
        "place",
        "slot",
        "step",
        "takers",
        "value",
    )

    def __init__(self, step: "Step", maker: Call | None, home: Call | None, value: Seen, has_gradient: bool) -> None:
        self.step, self.maker, self.home, self.place, self.value = step, maker, home, home, value
        self.has_gradient, self.is_watched = has_gradient, False
        self.takers: list[Call] = []
        self.givers: list[Traced] = []
        self.gradient: Seen | None = None
        self.number = len(step.looks)
        self.slot = 0

    def watch_gradient(self, tensor: Tensor) -> None:
        """Looks at the gradient of the tensor when it comes."""
        if self.is_watched or not tensor.requires_grad:
            return
        self.is_watched = True
        node = tensor.grad_fn
        if node is None:
            # The tensor is the loop's and may outlive the step.
            self.step.handles.append(tensor.register_hook(self._on_gradient))
        else:
            # The same gradient as in a hook of the tensor, at two thirds of the price.
            self.slot = tensor.output_nr
            node.register_prehook(self._on_gradients)

    def _on_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[self.slot]
        if gradient is not None:
            self._on_gradient(gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        if self.step.is_open:
            self.gradient = seen = _seen(gradient)
            if seen:
                self.step.gradients.append(self)

    def innermost_takers(self) -> list[Call]:
        """Calls it was given to, without those that gave it to a module of their own."""
        return [call for call in self.takers if not any(other.is_inside(call) for other in self.takers)]


class Step:
    """All that was seen in one step; ``gradients`` are the looks whose gradient was or may be non-finite, as seen."""

    def __init__(self) -> None:
        self.is_open = True
        self.looks: list[Look] = []
        self.gradients: list[Look] = []
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.known: dict[int, tuple[weakref.ref[Tensor], int, Look]] = {}
        self.handles: list[Any] = []

    def close(self) -> None:
        """Ends it. What is left of a graph may still hold its looks, so they let go of each other."""
        self.is_open = False
        for handle in self.handles:
            handle.remove()
        for call in self.calls:
            call.inputs, call.outputs = [], []


def known_look(step: Step, tensor: Tensor) -> Look | None:
    """What was seen of the tensor before, unless it has been written into since."""
    found = step.known.get(id(tensor))
    if found is None or found[0]() is not tensor or found[1] != _version(tensor):
        return None
    return found[2]


def worked_upon(step: Step, tensor: Tensor) -> Look | None:
    """What was seen of the tensor before it was written into once, or not at all."""
    found = step.known.get(id(tensor))
    if found is None or found[0]() is not tensor or found[1] < _version(tensor) - 1:
        return None
    return found[2]


def know(step: Step, tensor: Tensor, look: Look) -> None:
    """Lets the look stand for the tensor."""
    step.known[id(tensor)] = weakref.ref(tensor), _version(tensor), look


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:
        # Tensors of the inference mode have no counter.
        return 0


def look_at(step: Step, tensor: Tensor, maker: Call | None, home: Call | None, is_again: bool) -> Look | None:
    """Looks at a tensor; None if it holds nothing that could be seen."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return None
    has_gradient = tensor.requires_grad
    # A sum that autograd records costs more, and under anomaly detection far more.
    seen = FINITE if is_again else _seen(tensor.detach() if has_gradient else tensor)
    if seen is None:
        return None
    look = Look(step, maker, home, seen, has_gradient)
    step.looks.append(look)
    know(step, tensor, look)
    return look


def _seen(tensor: Tensor) -> Seen | None:
    """What the tensor holds; None if that cannot be read."""
    try:
        if tensor.is_cpu and tensor.dtype in _SUMMED:
            total = tensor.sum().item()
            if total - total == 0:
                return FINITE
        return _bounds(tensor)
    except RuntimeError:
        # Fake tensors and those inside torch.func transforms have no values to read.
        return None


def _bounds(tensor: Tensor) -> Seen | None:
    if not can_hold_nonfinite(tensor) or unreadable_kind(tensor) is not None:
        return None
    if not tensor.numel() or tensor._is_zerotensor():
        return FINITE
    values = stored_values(tensor).detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    elif values.element_size() == 1:
        values = values.to(torch.float32)
    low, high = torch.aminmax(values)
    return _kind(low.item(), high.item()) if values.is_cpu else (low, high)


def _kind(low: float, high: float) -> int:
    if math.isnan(low) or math.isnan(high):
        return NAN
    if high == math.inf:
        return INFINITY
    return NEGATIVE_INFINITY if low == -math.inf else FINITE


def read_back(looks: Sequence[Look]) -> None:
    """Puts kinds in the place of bounds that are still on their devices, with one read for each device."""
    waiting: dict[torch.device, list[tuple[Look, str, tuple[Tensor, Tensor]]]] = defaultdict(list)
    for look in looks:
        for name, seen in (("value", look.value), ("gradient", look.gradient)):
            if isinstance(seen, tuple):
                waiting[seen[0].device].append((look, name, seen))
    for entries in waiting.values():
        bounds = torch.stack([torch.stack(pair).to(torch.float64) for _, _, pair in entries]).tolist()
        for (look, name, _), (low, high) in zip(entries, bounds, strict=True):
            setattr(look, name, _kind(low, high))


def tensors_in(value: Any, depth: int = 0) -> Sequence[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses."""
    if type(value) is tuple and len(value) == 1 and type(value[0]) is Tensor:
        return value
    if isinstance(value, Tensor):
        return (value,)
    items: Iterable[Any] = ()
    if depth == _MAX_DEPTH:
        return ()
    if isinstance(value, tuple | list):
        items = value
    elif isinstance(value, dict | Mapping):
        items = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name, None) for field in fields(value)]
    found: list[Tensor] = []
    for item in items:
        kind = type(item)
        if kind is Tensor:
            found.append(item)
        elif kind not in _ATOMS:
            found.extend(tensors_in(item, depth + 1))
    return found
