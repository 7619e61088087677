"""The edge stream: how alike two nodes are over time, and the graph that follows from it.

Shapes: B batch, T time steps, N nodes, F features, E pairs of nodes i < j in row-major order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.config import ModelConfig
from detector.mamba import BiMambaStack

NORM_EPS = 1e-4
"""Added to a node's squared norm. Gradients of the similarity are at most 1 / sqrt(NORM_EPS) = 100 times its own."""


def pairwise_cosine(nodes_BTNF: Tensor) -> Tensor:
    """Cosine similarity of every pair of nodes at every time step; zero where a node is zero.

    Args:
        nodes_BTNF: Features, (batch, time, nodes, features); any finite value whose square is finite.

    Returns:
        (batch, pairs, time), in [-1, 1], float32; the pairs (0, 1), (0, 2), ... are the strict upper triangle by rows.

    Numerics:
        Each vector is multiplied by ``rsqrt(sum x^2 + eps)``. With eps under the root neither the value nor the
        gradient of a zero vector divides by zero; adding it to the norm instead would still differentiate sqrt at 0,
        which is inf, and inf * 0 is NaN. Two vectors of norm 1 lose 1e-4 of their similarity. Computed in float32 under
        autocast, because float16 squares overflow at 256.
    """
    nodes = nodes_BTNF.to(torch.promote_types(nodes_BTNF.dtype, torch.float32))
    with torch.autocast(nodes.device.type, enabled=False):
        unit = nodes * torch.rsqrt(nodes.square().sum(-1, keepdim=True) + NORM_EPS)
        similarity = unit @ unit.mT
    num_nodes = nodes.shape[2]
    row, column = torch.triu_indices(num_nodes, num_nodes, offset=1, device=nodes.device)
    return similarity.flatten(2).index_select(2, row * num_nodes + column).transpose(1, 2)


class EdgeStream(nn.Module):
    """Turns the similarity of each pair into a positive weight, with the pair's whole past and future in view.

    A scalar is lifted to ``edge_features`` channels, runs through the bidirectional stack, returns to a scalar and
    passes softplus. The lift has a bias, with Linear's own initial values: without one every lifted vector would be
    ``s * w``, of which a layer norm keeps only the sign of s, and top-k would choose among ties. The stack norms its
    mixers' inputs and not its residual path, so s itself reaches the output as well.

    Args:
        config: Sizes; the ``edge_*`` fields are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lift = nn.Linear(1, config.edge_features)
        self.stack = BiMambaStack(config.edge_features, config.edge_layers, config.edge_d_state, config.edge_headdim)
        self.to_weight = nn.Linear(config.edge_features, 1)

    def forward(self, similarity_BET: Tensor) -> Tensor:
        """Positive weights, (batch, pairs, time), from similarities of the same shape."""
        sequences = self.lift(similarity_BET.flatten(0, 1).unsqueeze(-1))
        weights = self.to_weight(self.stack(sequences)).squeeze(-1)
        return F.softplus(weights).view(similarity_BET.shape)


def assemble_adjacency(weights_BET: Tensor, *, num_nodes: int, top_k: int, threshold: float) -> Tensor:
    """Symmetric adjacency of the strongest edges at every time step.

    Each node keeps its ``top_k`` heaviest edges, of those the ones above ``threshold``, and the result is averaged with
    its transpose: an edge that only one of its two nodes kept ends with half its weight, and a node's degree may exceed
    ``top_k``.

    Args:
        weights_BET: Weight of each pair, (batch, pairs, time), >= 0.
        num_nodes: N; there are N (N - 1) / 2 pairs.
        top_k: Edges kept per node, 1 to N - 1.
        threshold: Weights at or below it are dropped.

    Returns:
        (batch, time, nodes, nodes), zero on the diagonal.
    """
    padded = F.pad(weights_BET.transpose(1, 2), (0, 1))  # the last entry, a zero, is the diagonal's
    pair_of = torch.full((num_nodes, num_nodes), weights_BET.shape[1], device=weights_BET.device)
    row, column = torch.triu_indices(num_nodes, num_nodes, offset=1, device=weights_BET.device)
    pair_of[row, column] = pair_of[column, row] = torch.arange(len(row), device=weights_BET.device)
    dense = padded.index_select(2, pair_of.flatten()).unflatten(2, (num_nodes, num_nodes))
    strongest = dense.detach().topk(top_k, dim=-1).indices
    kept = torch.zeros_like(dense, dtype=torch.bool).scatter_(-1, strongest, True) & (dense.detach() > threshold)
    # where, not a product: a dropped weight takes no gradient, whatever it is.
    sparse = torch.where(kept, dense, 0.0)
    return (sparse + sparse.mT) / 2
