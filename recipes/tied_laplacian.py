"""Eigenvectors of a graph with interchangeable nodes, used as features with gradients through ``eigh``.

Interchangeable nodes give equal eigenvalues; a graph without edges is the extreme case. The forward pass is finite; the
backward pass divides by the difference of the pair. Broken: gradients go through the decomposition. Fixed: the
eigenvectors are detached.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanhunt.records.recipes import Recipe

_NODES = 4


class GraphFeatures(nn.Module):
    """Scores a graph from the eigenvectors of its weighted Laplacian.

    Args:
        is_detached: Whether the eigenvectors are cut from the graph of gradients.
    """

    def __init__(self, *, is_detached: bool) -> None:
        super().__init__()
        self.is_detached = is_detached
        self.edge_scale = nn.Parameter(torch.ones(()))
        self.score = nn.Linear(_NODES * _NODES, 1)

    def forward(self, adjacency: Tensor) -> Tensor:
        """(batch, nodes, nodes) edge weights to (batch, 1) scores."""
        weights = adjacency * self.edge_scale
        laplacian = torch.diag_embed(weights.sum(-1)) - weights
        _, vectors = torch.linalg.eigh(laplacian)
        if self.is_detached:
            vectors = vectors.detach()
        return self.score((weights @ vectors).flatten(1))


@dataclass(frozen=True)
class _Target:
    is_detached: bool

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GraphFeatures(is_detached=self.is_detached)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["adjacency"]).square().mean()


def _build(fixed: bool) -> tuple[_Target, dict[str, Tensor]]:
    # No edges at all: every node is alike, and all eigenvalues are exactly 0.
    edgeless = torch.zeros(1, _NODES, _NODES)
    path = torch.diag(torch.ones(_NODES - 1), 1)
    return _Target(is_detached=fixed), {"adjacency": torch.cat([edgeless, (path + path.T)[None]])}


RECIPE = Recipe(
    title="NaN gradient through eigenvectors of a Laplacian with tied eigenvalues",
    expects=("NH203",),
    build=_build,
    source="Magnus 1985, Econometric Theory 1(2): the derivative of an eigenvector holds 1 / (value_i - value_j)",
)
