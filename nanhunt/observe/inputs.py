"""What a module is called with: the names of its inputs, as whoever calls it would say them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.finite import list_is_finite, unreadable_kind
from nanhunt.observe.modes import untraced
from nanhunt.observe.origins import LOSS_ARGUMENTS
from nanhunt.observe.values import MAX_DEPTH, own_parts, tensors_of
from nanhunt.records.labels import is_label


def declare_inputs(tracer: ExactTracer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Tells the tracer what a module is called with. Names are worked out only where something is non-finite."""
    ledger, births_of = tracer.ledger, tracer.ledger.memory.births_of
    inputs = [part for _, part in own_parts(("", tensor) for tensor in tensors_of((args, kwargs), MAX_DEPTH + 2))]
    with untraced(), torch.no_grad():
        is_clean = list_is_finite([tensor for tensor in inputs if unreadable_kind(tensor) is None])
    if not is_clean:
        known = {id(tensor) for tensor in inputs if births_of(tensor)}
        tracer.declare("batch", named_inputs(module, args, kwargs), here=True)
        for tensor in without_samples(module, args, kwargs):
            if id(tensor) not in known:
                ledger.note_no_samples(tensor)
    if tracer.is_watchful:
        ledger.fed.update(*map(births_of, inputs))


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """``input 0``, ``input batch['age']``, ``input 1 (target of MSELoss)`` and their tensors."""
    return [(f"input {name}{role}", tensor) for name, role, tensor in _named(module, args, kwargs)]


def without_samples(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Those inputs whose first dimension is not known to be that of the samples.

    States of recurrent modules count layers there, what has the sequence first counts time steps, and what has another
    length than the first of the inputs counts something else.
    """
    found = list(_named(module, args, kwargs))
    if not found:
        return []
    is_batch_first = getattr(module, "batch_first", not isinstance(module, nn.RNNBase))
    states = [tensor for value in _states(module, args, kwargs) for tensor in tensors_of(value)]
    first = found[0][2]
    return [
        tensor
        for _, _, tensor in found
        if not is_batch_first or any(tensor is state for state in states) or tensor.shape[:1] != first.shape[:1]
    ]


def _states(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    if not isinstance(module, nn.RNNBase):
        return []
    return [*args[1:], *(value for name, value in kwargs.items() if name == "hx")]


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    for position, value in enumerate(args):
        for path, tensor in _paths(str(position), value, MAX_DEPTH):
            yield from ((path, _role(module, position), part) for _, part in own_parts([("", tensor)]))
    for name, value in kwargs.items():
        for path, tensor in _paths(name, value, MAX_DEPTH):
            yield from ((path, "", part) for _, part in own_parts([("", tensor)]))


def _paths(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``tensors_of`` gives, each with the keys that lead to it."""
    if isinstance(value, Tensor) or not depth:
        yield from ((name, tensor) for tensor in tensors_of(value, depth))
    elif isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield from _paths(f"{name}[{key!r}]", item, depth - 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _paths(f"{name}[{number}]", item, depth - 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _paths(f"{name}.{field.name}", getattr(value, field.name, None), depth - 1)
    else:
        yield from ((name, tensor) for tensor in tensors_of(value, depth))


def _role(module: nn.Module, position: int) -> str:
    """`` (target of MSELoss)`` where the argument at this position of its forward is called so; else nothing."""
    code = getattr(type(module).forward, "__code__", None)
    names = code.co_varnames[1 : code.co_argcount] if code is not None else ()
    name = names[position] if position < len(names) else ""
    kind = type(module).__name__
    is_telling = is_label(name) or (name in LOSS_ARGUMENTS and kind.endswith("Loss"))
    return f" ({name} of {kind})" if is_telling else ""
