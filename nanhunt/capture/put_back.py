"""Running a step on somebody's model without leaving a trace in it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from nanhunt.capture.rng import rng_state, set_rng_state


@contextlib.contextmanager
def put_back(module: nn.Module | None, rng: dict[str, Any] | None = None) -> Iterator[None]:
    """Lets a run begin without gradients, and restores them, the state and the random generators after it.

    Args:
        module: Whose parameters, buffers and gradients are put back; None for the random generators alone.
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
        yield
    finally:
        for tensor, saved, gradient in zip(state, copies, gradients, strict=True):
            # Past the version counter: a graph of the caller's may still need the tensor.
            tensor.data.copy_(saved)
            tensor.grad = gradient
        set_rng_state(random)
