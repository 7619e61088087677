"""A tiny model whose root goes non-finite on demand, the loop that trains it, and what the tests ask of a capture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.capture.format import Capture, read_capture, write_capture

BAD = 2
"""The sample of a bad batch whose gate is shut."""


class Gated(nn.Module):
    """Takes a root of each row's energy times its gate; where the gate is 0, so is the root's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, rows: Tensor, gate: Tensor) -> Tensor:
        hidden = self.first(rows).tanh()
        root = (hidden.square().sum(-1) * gate).sqrt()
        return self.head(hidden) + root[:, None]


class Tiny:
    """The whole step of the model above."""

    max_grad_norm = 1.0

    def build(self, seed: int) -> nn.Module:
        return Gated()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["rows"], batch["gate"]).square().mean()


def batch(*, bad: bool = False) -> dict[str, Tensor]:
    gate = torch.ones(5)
    gate[BAD] = 0.0 if bad else 1.0
    return {"rows": torch.randn(5, 3), "gate": gate}


def train(folder: Path, target: Tiny, batches: list[Any], *, clips: bool = True) -> Path:
    """Trains until the step that fails, and gives its capture."""
    model = target.build(0)
    optimizer = target.optimizer(model)

    def loop() -> None:
        for one in hunt.batches(batches):
            optimizer.zero_grad()
            target.loss(model, one).backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    stops = pytest.raises((nanhunt.NonFiniteStep, torch.linalg.LinAlgError))
    with stops, nanhunt.watch(model, optimizer, out_dir=folder) as hunt:
        loop()
    return hunt.faults[0].capture


def rewritten(path: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The capture with its payload changed, written anew."""
    old = read_capture(path)
    payload = dict(old.payload)
    change(payload)
    return write_capture(Capture(old.meta, payload), folder)


def reasons(report: Any) -> dict[str, str]:
    return {skip.what: skip.reason for skip in report.skips}
