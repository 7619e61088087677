"""The batches that are looked at, and which of their tensors are labels."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanhunt.errors import NanhuntError, first_line

MAX_BATCHES = 50
MAX_DEPTH = 4

_LABELS = ("labels", "label", "targets", "target", "y")


class Parts(NamedTuple):
    """One batch, taken apart.

    Attributes:
        tensors: By name.
        labels: Name of the labels; empty where nothing says which they are.
        unread: What cannot be looked at, by name: what it is instead.
    """

    tensors: dict[str, Tensor]
    labels: str
    unread: dict[str, str]


def batches_of(data: Any) -> Iterator[Any]:
    """One batch, or the first of several, at most ``MAX_BATCHES``.

    A tensor, a mapping, a tuple or a dataclass is one batch; so is a list with a tensor in it, which is what torch's
    own collation gives. Everything else that can be iterated gives batches.
    """
    if _is_batch(data):
        yield data
        return
    if not isinstance(data, Iterable):
        raise NanhuntError(f"a {type(data).__name__} is neither a batch nor an iterable of batches")
    try:
        yield from islice(data, MAX_BATCHES)
    # A data loader runs the user's code and may fail in any way.
    except Exception as error:
        raise NanhuntError(f"no further batch: {type(error).__name__}: {first_line(error)}") from error


def _is_batch(data: Any) -> bool:
    if isinstance(data, Tensor | np.ndarray | Mapping | tuple):
        return True
    if isinstance(data, list):
        return any(isinstance(part, Tensor | np.ndarray) for part in data)
    return dataclasses.is_dataclass(data) and not hasattr(data, "__iter__")


def take_apart(batch: Any, labels: str | int | None) -> Parts:
    """The tensors of a batch by name.

    Args:
        batch: One batch.
        labels: Key, field or place of the labels; None for one of the usual names, else the second of a pair.

    Raises:
        NanhuntError: If it holds no tensor, or no tensor of that name.
    """
    found_tensors = dict(_named(batch, "", MAX_DEPTH))
    unread = {name: why for name, tensor in found_tensors.items() if (why := _unreadable(tensor))}
    tensors = {name: tensor.detach() for name, tensor in found_tensors.items() if name not in unread}
    if not tensors:
        what = (
            "holds no tensor"
            if not unread
            else "holds nothing to look at: " + ", ".join(f"{name} is {why}" for name, why in unread.items())
        )
        raise NanhuntError(f"the batch, a {type(batch).__name__}, {what}")
    if labels is not None:
        found = f"batch[{labels}]" if isinstance(labels, int) and "batch[0]" in tensors else str(labels)
        if found not in tensors:
            raise NanhuntError(f"the batch has no {found!r}", help=f"it has: {', '.join(tensors)}")
        return Parts(tensors, found, unread)
    named = next((name for word in _LABELS for name in tensors if name.rpartition(".")[2].lower() == word), "")
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return Parts(tensors, named or ("batch[1]" if is_pair and "batch[1]" in tensors else ""), unread)


def _unreadable(tensor: Tensor) -> str:
    """What a tensor is that holds no plain numbers; empty for others."""
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return "a sparse tensor"
    return f"of complex numbers, {str(tensor.dtype).removeprefix('torch.')}" if tensor.is_complex() else ""


def _named(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        yield name or "batch", value
    elif depth and not isinstance(value, str | bytes):
        for key, part in _parts(value):
            is_place = isinstance(key, int) and isinstance(value, list | tuple)
            place = f"{name or 'batch'}[{key}]" if is_place else f"{name}.{key}" if name else str(key)
            yield from _named(part, place, depth - 1)


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    # What torch_geometric and transformers give: objects that list their keys.
    keys = getattr(value, "keys", None)
    return [(key, value[key]) for key in (keys() if callable(keys) else keys or ())]
