"""What an animal of the zoo is: a model with one training step, as anybody could have written it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Training:
    """One run under way: what a training script holds in its local variables.

    Attributes:
        model: The model.
        optimizer: Its optimizer; the one that is observed where there are more.
        loss: The loss of a batch.
        extras: Whatever else has a state: scheduler, scaler, second optimizer, averaged weights.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[nn.Module, Any], Tensor]
    extras: dict[str, Any] = field(default_factory=dict)


def plain_step(training: Training, batch: Any) -> Tensor:
    """The usual step: clear, forward, backward, clip, move."""
    training.optimizer.zero_grad()
    loss = training.loss(training.model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    return loss


def unclipped_step(training: Training, batch: Any) -> Tensor:
    """The step of a model whose gradients cannot be clipped together."""
    training.optimizer.zero_grad()
    loss = training.loss(training.model, batch)
    loss.backward()
    training.optimizer.step()
    return loss


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def no_extras(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Entry:
    """One animal.

    Attributes:
        name: Kebab-case name.
        build: Makes the model with the initial weights of a seed.
        batch: Makes the batch of a seed, whatever it is.
        loss: The loss of the model on a batch.
        optimizer: Makes the optimizer.
        step: One step of the loop; returns the loss that a script would print.
        extras: Makes what else the loop holds.
    """

    name: str
    build: Callable[[int], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[nn.Module], Optimizer] = adamw
    step: Callable[[Training, Any], Tensor] = plain_step
    extras: Callable[[nn.Module, Optimizer], dict[str, Any]] = no_extras

    def begin(self, seed: int) -> Training:
        """The run before its first step."""
        model = self.build(seed)
        optimizer = self.optimizer(model)
        return Training(model, optimizer, self.loss, self.extras(model, optimizer))


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A builder whose initial weights follow from the seed."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return build


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that leave the global generator alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(*shape: int, seed: int, below: int) -> Tensor:
    """Whole numbers from 0 that leave the global generator alone."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int) -> Tensor:
    """Six rows of five features."""
    return normal(6, 5, seed=seed)


def images(seed: int) -> Tensor:
    """Four images of 8 by 8."""
    return normal(4, 3, 8, 8, seed=seed)


def tokens(seed: int) -> Tensor:
    """Two sentences of seven words out of eleven."""
    return numbers(2, 7, seed=seed, below=11)


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of each word given those before it."""
    scores = model(batch[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
