"""Causes of faults of the backward pass that are named when a captured step is replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanhunt

LossOf = Callable[[Tensor], Tensor]


class Scaled(nn.Module):
    """Multiplies each element by a weight of 1."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_elements))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Target:
    """A step whose loss is given."""

    def __init__(self, loss_of: LossOf) -> None:
        self.loss_of = loss_of

    def build(self, seed: int) -> nn.Module:
        return Scaled(2)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-9)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss_of(model(batch["x"]))


def replayed(folder: Path, values: Any, loss_of: LossOf) -> Any:
    """The first finding of the replay of a step that failed."""
    target = Target(loss_of)
    model = target.build(0)
    optimizer = target.optimizer(model)

    def train() -> None:
        for batch in hunt.batches([{"x": torch.tensor(values)}]):
            target.loss(model, batch).backward()
            optimizer.step()

    with pytest.raises(nanhunt.NonFiniteStep), nanhunt.watch(model, optimizer, out_dir=folder) as hunt:
        train()
    report = nanhunt.replay(hunt.faults[0].capture, target=target, num_seeds=0)
    assert report.verdict.certainty in ("observed", "tested")
    return report.first


CAUSES = [
    ("NH202", "sqrt at 0", [0.0, 1.0], lambda x: x.sqrt().sum()),
    ("NH208", "sqrt", [0.0, 1.0], lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum()),
    ("NH209", "x ** 0.5 at 0", [0.0, 1.0], lambda x: x.pow(0.5).sum()),
    ("NH210", "acos at 1", [1.0, 0.5], lambda x: x.acos().sum()),
    ("NH211", "log at 0", [0.0, 0.5], lambda x: x.log().exp().sum()),
    ("NH212", "reciprocal at 1e-30 is -1e+60", [1e-30, 1.0], lambda x: x.reciprocal().sum()),
    ("NH213", "diagonal of R is 0", [[0.0, 0.0], [0.0, 0.0]], lambda x: torch.linalg.qr(x).Q.sum()),
    ("NH203", "equal", [[1.0, 0.0], [0.0, 1.0]], lambda x: torch.linalg.eig(x).eigenvectors.abs().sum()),
    ("NH220", "came to 1e+40", [1.0, 1.0], lambda x: (x * 1e-30 * 1e20 * 1e20).sum()),
]


@pytest.mark.parametrize(("code", "says", "values", "loss_of"), CAUSES)
def test_cause_is_named_from_what_the_replay_kept(tmp_path: Path, code: str, says: str, values: Any, loss_of: LossOf):
    first = replayed(tmp_path, values, loss_of)

    assert (first.code, first.location.phase) == (code, "backward")
    assert says in first.message


def test_infinity_that_where_leaves_out_is_the_untaken_branch_in_a_replay_too(tmp_path: Path):
    first = replayed(tmp_path, [0.0, 2.0], lambda x: torch.where(x > 0, 1 / x, 0.0).sum())

    assert (first.code, first.location.phase) == ("NH208", "forward")
