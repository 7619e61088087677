"""What a healthy run is: a model that learns something, with a schedule, in one of four precisions."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

NUM_STEPS = 24
PRECISIONS = ("float32", "bfloat16 autocast", "bfloat16", "float16 and scaler")

_AUTOCAST = {"bfloat16 autocast": torch.bfloat16, "float16 and scaler": torch.float16}


@dataclass
class Learner:
    """A model about to be trained.

    Attributes:
        model: All that is trained.
        losses: One for each optimizer; makes its own batch.
        optimizers: Steps after its loss.
        distance: How far it is from what it is to learn; None for the first loss.
        max_norm: Limit of the gradient norm; None for no clipping.
    """

    model: nn.Module
    losses: tuple[Callable[[], Tensor], ...]
    optimizers: tuple[Optimizer, ...]
    distance: Callable[[], float] | None = None
    max_norm: float | None = 1.0

    def train(self, precision: str = "float32", num_steps: int = NUM_STEPS) -> list[float]:
        """Trains it; gives the distance of every step."""
        schedules = [LambdaLR(optimizer, warm_up_and_cosine(num_steps)) for optimizer in self.optimizers]
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16 and scaler")
        distances = []
        for _ in range(num_steps):
            values = [self._step(*pair, precision, scaler) for pair in zip(self.losses, self.optimizers, strict=True)]
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() >= before:
                # What the scaler has skipped is no step of the schedule.
                for schedule in schedules:
                    schedule.step()
            distances.append(self.distance() if self.distance is not None else values[0])
        return distances

    def _step(self, loss_of: Callable[[], Tensor], optimizer: Optimizer, precision: str, scaler: Any) -> float:
        dtype = _AUTOCAST.get(precision)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype) if dtype is not None else contextlib.nullcontext():
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.max_norm)
        scaler.step(optimizer)
        return float(loss.detach())


def warm_up_and_cosine(num_steps: int) -> Callable[[int], float]:
    """A rate that rises from nothing over four steps and then falls to nothing."""
    return lambda step: min(step / 4, 1.0) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def adamw(model: nn.Module, loss: Callable[[], Tensor], lr: float = 1e-2, **options: Any) -> Learner:
    """A learner with the usual optimizer."""
    return Learner(model, (loss,), (torch.optim.AdamW(model.parameters(), lr=lr),), **options)


def momentum(model: nn.Module, loss: Callable[[], Tensor], lr: float = 0.05, **options: Any) -> Learner:
    """A learner with the optimizer of vision models."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return Learner(model, (loss,), (optimizer,), **options)


def like(model: nn.Module, values: Tensor) -> Tensor:
    """The values in the type of the model's weights."""
    return values.to(next(model.parameters()).dtype)
