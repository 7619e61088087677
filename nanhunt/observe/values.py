"""The tensors in what a program passes around: arguments, outputs, optimizer state."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.collectives import own_part

MAX_NODES = 50_000
"""Autograd nodes gone through in search of leaves."""

MAX_DEPTH = 4
"""How deep containers and objects are opened."""


def tensors_of(value: Any, depth: int = MAX_DEPTH) -> Iterator[Tensor]:
    """The tensors in containers, dataclasses and plain objects; modules are not opened."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, nn.Module | str | bytes | type):
        for part in _parts(value):
            yield from tensors_of(part, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, np.ndarray):
        # It may be the memory of a tensor.
        return [torch.from_numpy(value)] if value.dtype.kind == "f" and value.flags.writeable else ()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else ()


def leaves_of(roots: Iterable[Tensor]) -> list[Tensor]:
    """The tensors whose gradients a backward pass from the roots adds to."""
    nodes = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(nodes)
    leaves: list[Tensor] = []
    while nodes and len(seen) < MAX_NODES:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return leaves


def own_parts(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What of the tensors lies in this process."""
    return ((name, part) for name, tensor in named if (part := own_part(tensor)) is not None)


def optimizer_tensors(model: nn.Module | None, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state as ``exp_avg of encoder.0.weight``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
    for parameter, key, value in state_tensors(optimizer):
        yield f"{key} of {names.get(id(parameter), 'an unnamed parameter')}", value


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Every tensor of the optimizer's state, with its parameter and its key."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield parameter, key, value


def values_at(value: Tensor, positions: Iterable[tuple[int, ...]], shape: tuple[int, ...]) -> tuple[float, ...]:
    """Values at positions of a shape that the tensor broadcasts to; none where it does not."""
    try:
        wide = value.expand(shape)
    except RuntimeError:
        return ()
    return tuple(as_float(wide[position]) for position in positions)


def as_float(value: Any) -> float:
    """A Python float; the magnitude of a complex number."""
    return float(value.abs()) if value.is_complex() else float(value)
