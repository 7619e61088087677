"""What a tensor is that no traced operation wrote: a weight, a buffer, optimizer state, or data named by a variable."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.call import Origin
from nanhunt.observe.finite import unreadable_kind
from nanhunt.observe.memory import storage_key
from nanhunt.observe.source import is_users_code
from nanhunt.records.ops import ValueFacts

MAX_FRAMES = 30
"""Frames of the user's whose variables are searched."""


def find_origin(tensor: Tensor, modules: Iterable[tuple[str, nn.Module]], optimizers: Iterable[Optimizer]) -> Origin:
    """Searches for the tensor's memory where tensors live.

    Args:
        tensor: Holds non-finite values of unknown origin.
        modules: The models seen, each with the prefix its names have.
        optimizers: The optimizers seen.
    """
    wanted = storage_key(tensor)
    models = list(modules)
    for prefix, model in models:
        found = _in_model(wanted, model, prefix)
        if found is not None:
            return found
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if _is_same(value, wanted):
                    names = {id(own): name for _, model in models for name, own in model.named_parameters()}
                    return Origin("optimizer state", f"{key} of {names.get(id(parameter), 'an unnamed parameter')}")
    if torch._C._current_autograd_node() is not None:
        return Origin("constant")
    return _in_variables(wanted, sys._getframe(1))


def _in_model(wanted: int, model: nn.Module, prefix: str) -> Origin | None:
    for name, module in model.named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        for kind, named in (
            ("parameter", module.named_parameters(recurse=False)),
            ("buffer", module.named_buffers(recurse=False)),
            ("module attribute", _attributes(module)),
        ):
            for own, value in named:
                if _is_same(value, wanted):
                    return Origin(kind, f"{path}.{own}" if path else own, path)
    return None


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors that a module holds as plain attributes, also one level deep in lists and dicts."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from _tensors(name, value, depth=1)


def _in_variables(wanted: int, frame: FrameType | None) -> Origin:
    """The variable that holds the tensor, in the user's frames, innermost first; it is data."""
    num_seen = 0
    while frame is not None and num_seen < MAX_FRAMES:
        if is_users_code(frame.f_code):
            num_seen += 1
            for name, value in list(frame.f_locals.items()):
                for path, found in _tensors(name, value, depth=2):
                    if _is_same(found, wanted):
                        return Origin("batch", path)
                if isinstance(value, nn.Module):
                    owned = _in_model(wanted, value, f"<{type(value).__name__}>")
                    if owned is not None:
                        return owned
        frame = frame.f_back
    return Origin("batch")


def _tensors(name: str, value: Any, *, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, dict):
        for key, item in list(value.items())[:100]:
            yield from _tensors(f"{name}[{key!r}]", item, depth=depth - 1)
    elif depth and isinstance(value, list | tuple):
        for number, item in enumerate(value[:100]):
            yield from _tensors(f"{name}[{number}]", item, depth=depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name, None), depth=depth - 1)


def _is_same(value: Any, wanted: int) -> bool:
    return (
        isinstance(value, Tensor)
        and unreadable_kind(value) is None
        and type(value) in (Tensor, nn.Parameter, nn.Buffer)
        and storage_key(value) == wanted
    )


def looks_like_mask(origin: Origin, facts: ValueFacts) -> bool:
    """Whether a tensor that no traced operation wrote is a mask: all its non-finite values are -inf, beside zeros.

    A mask that is part of the model may hold other numbers as well (distances, say), if it is a square table, from
    positions to positions, of which a good part is -inf.
    """
    if facts.num_neginf != facts.num_nonfinite or "running_" in origin.name or origin.phase == "backward":
        return False
    if not facts.abs_max or "mask" in origin.name.lower():
        return True
    is_table = origin.kind in ("buffer", "constant", "module attribute") and len(facts.shape) > 1
    is_table = is_table and facts.shape[-1] == facts.shape[-2]
    return is_table and facts.num_neginf >= facts.num_elements / 5
