"""A tenth of the learning rate, the usual first advice."""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis


def changes(diagnosis: Diagnosis) -> Iterator[Change]:
    """One experiment where there is an optimizer."""
    if diagnosis.target.has_optimizer:
        yield Change("lower-learning-rate", "learning rate divided by 10", "optimizer", optimizer=_slower)


def _slower(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 10
    return optimizer
