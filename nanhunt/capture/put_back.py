"""Running a step on somebody's model without leaving a trace in it."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.capture.rng import rng_state, set_rng_state


@contextlib.contextmanager
def put_back(module: nn.Module | None, rng: dict[str, Any] | None = None) -> Iterator[None]:
    """Lets a run begin without gradients, and restores them, the state and the random generators after it.

    Args:
        module: Whose parameters, buffers, gradients and training flags are put back; None for the random generators
            alone.
        rng: State of the random generators to begin with; None to leave them as they are.
    """
    random = rng_state()
    state = [] if module is None else [*module.parameters(), *module.buffers()]
    copies = [tensor.detach().clone() for tensor in state]
    gradients = [tensor.grad for tensor in state]
    for tensor in state:
        tensor.grad = None
    if rng is not None:
        set_rng_state(rng)
    try:
        with _kept_flags(module), _lent_buffers(module, state):
            yield
    finally:
        for tensor, saved, gradient in zip(state, copies, gradients, strict=True):
            # Past the version counter: a graph of the caller's may still need the tensor.
            tensor.data.copy_(saved)
            tensor.grad = gradient
        set_rng_state(random)


@contextlib.contextmanager
def _kept_flags(module: nn.Module | None) -> Iterator[None]:
    """A loss may call ``eval()`` or ``train()``."""
    flags = [] if module is None else [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextlib.contextmanager
def _lent_buffers(module: nn.Module | None, state: Iterable[Tensor]) -> Iterator[None]:
    """Puts copies in the place of the buffers, as far as that can go unnoticed.

    A forward that writes to a buffer raises its version counter for good, and a graph of the caller's that still needs
    it could not go backward any more.
    """
    parts = [] if module is None else [part for part in module.modules() if type(part._buffers) is dict]
    kept = [(part, dict(part._buffers)) for part in parts]
    # Tensors that share their memory would not in copies of them.
    shares = Counter(_memory(tensor) for tensor in state)
    copies: dict[int, Tensor] = {}
    for part, buffers in kept:
        for name, buffer in buffers.items():
            if type(buffer) is Tensor and _memory(buffer) and shares[_memory(buffer)] == 1:
                copy = copies.get(id(buffer))
                if copy is None:
                    copies[id(buffer)] = copy = buffer.detach().clone().requires_grad_(buffer.requires_grad)
                part._buffers[name] = copy
    try:
        yield
    finally:
        for part, buffers in kept:
            part._buffers.update(buffers)


def _memory(tensor: Tensor) -> int:
    """Where its storage begins; 0 for a tensor that has none of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()
