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
from nanhunt.records.labels import is_label, is_loss_weight
from nanhunt.records.ops import Spread, ValueFacts

MAX_FRAMES = 30
"""Frames of the user's whose variables are searched."""

MAX_SLICES = 8
"""Slices named one by one that are non-finite throughout."""

LOSS_ARGUMENTS = ("target", "weight", "pos_weight")
"""What torch's own losses call what is not the prediction."""

_LOSSES = "torch.nn.functional"


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
    num_seen, role = 0, ""
    while frame is not None and num_seen < MAX_FRAMES:
        role = role or _role_in_loss(wanted, frame)
        if is_users_code(frame.f_code):
            num_seen += 1
            for name, value in list(frame.f_locals.items()):
                for path, found in _tensors(name, value, depth=2):
                    if _is_same(found, wanted):
                        is_named = not role or role.startswith(f"{path} of ")
                        return Origin("batch", role or path if is_named else f"{path} ({role})")
                if isinstance(value, nn.Module):
                    owned = _in_model(wanted, value, f"<{type(value).__name__}>")
                    if owned is not None:
                        return owned
        frame = frame.f_back
    return Origin("batch", role)


def _role_in_loss(wanted: int, frame: FrameType) -> str:
    """``target of mse_loss`` where the frame is that of one of torch's losses, which was given the tensor."""
    name = frame.f_code.co_name
    if frame.f_globals.get("__name__") != _LOSSES or not name.endswith(("loss", "entropy", "logits")):
        return ""
    arguments = [argument for argument in LOSS_ARGUMENTS if _is_same(frame.f_locals.get(argument), wanted)]
    return f"{arguments[0]} of {name}" if arguments else ""


def spread_of(tensor: Tensor) -> Spread | None:
    """How the non-finite elements of a batch lie in it; None where there are no samples to tell apart."""
    if tensor.layout is not torch.strided or tensor.dim() < 1 or not tensor.numel():
        return None
    values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().to(torch.float32)
    bad = ~torch.isfinite(values)
    rows = bad.reshape(len(bad), -1)
    whole: list[tuple[int, int]] = []
    if len(bad) > 1 and not bool(rows.all()):
        for dim in range(1, bad.dim()):
            flat = bad.movedim(dim, 0).reshape(bad.shape[dim], -1).all(dim=1)
            whole += [(dim, int(position)) for position in flat.nonzero()[:MAX_SLICES]]
    return Spread(int(rows.any(dim=1).sum()), int(rows.all(dim=1).sum()), tuple(whole[:MAX_SLICES]))


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


def looks_like_log_table(origin: Origin, facts: ValueFacts) -> bool:
    """Whether data may be a table of logarithms or a mask with other numbers in it: all of its bad values are -inf.

    Which of the two it is, or a value of the data that was lost, is told by what reads it.
    """
    if origin.kind != "batch" or is_label(origin.name) or is_loss_weight(origin.name):
        return False
    return facts.num_neginf == facts.num_nonfinite < facts.num_elements
