"""What clipping by total norm does to the gradients there are."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from nanhunt.findings import Skip
from nanhunt.records.optimizer_audit import Clipping


def clipping_of(gradients: Sequence[Tensor], max_norm: float, scale: float | None = None) -> Clipping:
    """Clips copies of the gradients and counts what became of them."""
    copies = [SimpleNamespace(grad=gradient.detach().clone()) for gradient in gradients]
    holders: Any = copies
    nn.utils.clip_grad_norm_(holders, max_norm)
    pairs = [(gradient.detach(), one.grad) for gradient, one in zip(gradients, copies, strict=True)]
    # In float64: squares of large float32 gradients overflow where the gradients do not.
    norms = [torch.linalg.vector_norm(gradient.double()) for gradient, _ in pairs]
    return Clipping(
        max_norm=max_norm,
        norm=math.sqrt(sum(float(norm) ** 2 for norm in norms)),
        num_tensors=len(pairs),
        num_nonfinite=sum(not bool(before.isfinite().all()) for before, _ in pairs),
        num_nonfinite_after=sum(not bool(after.isfinite().all()) for _, after in pairs),
        num_zeroed=sum(bool(before.any()) and not bool(after.any()) for before, after in pairs),
        scale=scale,
    )


def clipped(gradients: Mapping[int, Tensor | None], max_norm: float) -> dict[int, Tensor | None]:
    """Copies of the gradients as the optimizer would get them."""
    copies = {key: SimpleNamespace(grad=one.clone()) for key, one in gradients.items() if one is not None}
    holders: Any = list(copies.values())
    nn.utils.clip_grad_norm_(holders, max_norm)
    return {key: copies[key].grad if key in copies else None for key in gradients}


def effect_of_one_infinity(max_norm: float) -> str:
    """What clipping makes of two gradients of which one is infinite, tried."""
    found = clipping_of([torch.tensor([math.inf]), torch.ones(1)], max_norm)
    spreads = found.num_zeroed == 1 and found.num_nonfinite_after == 1
    return "one infinite gradient becomes NaN and makes all others 0" if spreads else ""


def loss_scale(scaler: Any, optimizer: Optimizer) -> tuple[float | None, Skip | None]:
    """The loss scale that is still in the stored gradients; None where it was taken out, with a skip where unknown."""
    if scaler is None or not scaler.is_enabled():
        return None, None
    if all(one.grad is None for group in optimizer.param_groups for one in group["params"]):
        return None, Skip(
            "whether gradients are clipped before they are unscaled",
            "no gradients are stored between backward and step",
        )
    states: Mapping[int, Any] = scaler._per_optimizer_states
    state = states.get(id(optimizer))
    is_scaled = state is None or state["stage"] is OptState.READY
    return (float(scaler.get_scale()) if is_scaled else None), None
