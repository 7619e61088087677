"""A model of one layer, rows that spoil its gradient or not, and a loop over them under ``nanhunt.trace``."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.findings import Report


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(4, 2, bias=False)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def rows(*, is_bad: bool = False) -> Tensor:
    """Rows whose length has a gradient, or one row of zeros among them, whose length has none."""
    x = torch.randn(5, 4)
    if is_bad:
        x[1] = 0.0
    return x


def length(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).sqrt().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, are_bad: Iterable[bool]) -> None:
    for is_bad in are_bad:
        optimizer.zero_grad()
        length(model, rows(is_bad=is_bad)).backward()
        optimizer.step()


def traced(loop: Callable[[], object], model: nn.Module, optimizer: object = None, **options: str) -> Report:
    with nanhunt.trace(model, optimizer, **options) as hunt:
        loop()
    return hunt.report()


def facts(report: Report) -> dict[str, str]:
    return dict(report.facts)
