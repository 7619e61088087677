"""Parameters of zeros that hold each other at zero."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

NUM_LATER = 3
"""Steps that a weight without a gradient is given to find one, where what hides it is a zero that training removes."""

_SIZE = 1e-2
_NOISE = 1e-6
"""Gradients of this size beside the largest one are rounding, as those of a shift that a normalisation takes away."""


def blocked_by_zeros(model: nn.Module, zero: Mapping[str, Tensor], backward: Callable[[], None]) -> set[str]:
    """The zero parameters that have no gradient, find none in a few steps, and would have one if they were not 0.

    The last tells two zeros in a row from what has no gradient for another reason: an expert that no sample is sent
    to, or a mask.

    Args:
        model: One of our own, after its first backward pass; it is changed.
        zero: Its parameters that are 0 throughout, by name.
        backward: Runs the model and the backward pass.
    """
    blocked = _without_gradient(zero)
    for _ in range(NUM_LATER if blocked else 0):
        _descend(model.parameters())
        model.zero_grad(set_to_none=True)
        backward()
        blocked = _without_gradient(blocked)
        if not blocked:
            return set()
    if not blocked:
        return set()
    with torch.no_grad():
        for own in blocked.values():
            own.add_(_SIZE * torch.randn_like(own))
    model.zero_grad(set_to_none=True)
    backward()
    largest = max((_size(own) for own in model.parameters()), default=0.0)
    return {name for name, own in blocked.items() if _size(own) > _NOISE * largest}


def _without_gradient(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own for name, own in parameters.items() if own.grad is not None and not _size(own)}


def _size(parameter: Tensor) -> float:
    """Largest magnitude of the gradient; 0 without one."""
    gradient = parameter.grad
    if gradient is None:
        return 0.0
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(values.abs().amax()) if values.numel() else 0.0


def _descend(parameters: Iterable[Tensor], size: float = _SIZE) -> None:
    """Moves every parameter by ``size`` (root mean square) against its gradient."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                rms = float(parameter.grad.double().square().mean().sqrt())
                if rms > 0:
                    parameter.sub_(parameter.grad / rms * size)
