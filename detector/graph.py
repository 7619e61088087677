"""The graph half of the detector: Laplacian, positional encoding and propagation, dense and all time steps at once.

Shapes: B batch, T time steps, N nodes, F features, K eigenvectors. Graphs of 19 nodes are dense matrices here: a
batched product is faster than a sparse one by message passing, and repeats bit for bit, which scatter does not.
"""

import torch
from torch import Tensor, nn

from detector.config import ModelConfig


def normalized_laplacian(adjacency: Tensor) -> Tensor:
    """Symmetric normalised Laplacian, ``I - D^-1/2 A D^-1/2``.

    Args:
        adjacency: Symmetric weights >= 0, (..., nodes, nodes).

    Returns:
        (..., nodes, nodes), float32; eigenvalues in [0, 2]. The row of a node without edges is that of the identity.

    Numerics:
        The degree of a node without edges is replaced by 1 before the root, which changes nothing, as its row of A is
        zero. ``0^-1/2`` would be inf, and hiding it afterwards leaves the gradient inf * 0 = NaN. A small constant
        instead, such as 1e-6, would multiply gradients by a million there.
    """
    weights = adjacency.to(torch.promote_types(adjacency.dtype, torch.float32))
    degree = weights.sum(-1)
    inverse_root = torch.where(degree > 0, degree, 1.0).rsqrt()
    scaled = inverse_root.unsqueeze(-1) * weights * inverse_root.unsqueeze(-2)
    return torch.eye(weights.shape[-1], device=weights.device) - scaled


class LaplacianPositionalEncoding(nn.Module):
    """The ``pe_dim`` smoothest eigenvectors of every time step's Laplacian, one row per node.

    The trivial eigenvector is among them, as in the original. A sign is arbitrary, so each vector is turned to a
    non-negative sum over nodes. The encoding is computed at every n-th step (``semi_dynamic_interval``) and held.

    Numerics:
        Float32 with autocast off. The derivative of an eigenvector divides by the gap to every other eigenvalue: where
        two coincide it is infinite, in the backward pass only. ``laplacian_shift`` moves all eigenvalues alike and so
        leaves every gap as it was. ``pe_gradient = "detached"`` takes the encoding as a constant and has no such path;
        ``"through_eigh"`` differentiates it (tests/detector/test_graph.py shows both on a complete graph).

    Args:
        config: Sizes; ``pe_dim``, ``pe_gradient``, ``laplacian_shift`` and ``semi_dynamic_interval`` are read.

    Raises:
        ValueError: If more eigenvectors are asked for than there are nodes, the interval is below 1, or ``pe_gradient``
            is unknown.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not 1 <= config.pe_dim <= config.num_channels:
            raise ValueError(f"pe_dim must be 1 to {config.num_channels}, the number of nodes, got {config.pe_dim}")
        if config.semi_dynamic_interval < 1:
            raise ValueError(f"semi_dynamic_interval must be 1 or more, got {config.semi_dynamic_interval}")
        if config.pe_gradient not in ("detached", "through_eigh"):
            raise ValueError(f"pe_gradient must be 'detached' or 'through_eigh', got {config.pe_gradient!r}")
        self.num_vectors = config.pe_dim
        self.interval = config.semi_dynamic_interval
        self.shift = config.laplacian_shift
        self.is_detached = config.pe_gradient == "detached"

    def forward(self, adjacency_BTNN: Tensor) -> Tensor:
        """(batch, time, nodes, nodes) to (batch, time, nodes, pe_dim), float32."""
        num_steps = adjacency_BTNN.shape[1]
        # Sliced first, so that the steps in between cost nothing.
        computed = adjacency_BTNN[:, :: self.interval]
        if self.is_detached:
            computed = computed.detach()
        with torch.autocast(computed.device.type, enabled=False):
            encoding = self._eigenvectors(normalized_laplacian(computed))
        if self.interval == 1:
            return encoding
        return encoding.repeat_interleave(self.interval, dim=1)[:, :num_steps]

    def _eigenvectors(self, laplacian: Tensor) -> Tensor:
        """The first eigenvectors, sign fixed, (..., nodes, pe_dim)."""
        if self.shift:
            laplacian = laplacian + self.shift * torch.eye(laplacian.shape[-1], device=laplacian.device)
        _, eigenvectors = torch.linalg.eigh(laplacian)
        vectors = eigenvectors[..., : self.num_vectors]
        return vectors * torch.where(vectors.detach().sum(-2, keepdim=True) < 0, -1.0, 1.0)


class SSGConv(nn.Module):
    """Simple spectral graph convolution: a weighted sum of a node's own and its neighbours' features, then Linear.

    ``h = alpha x + (1 - alpha) / hops * sum_k P^k x`` for k = 1 ... hops, with ``P = D^-1/2 (A + I) D^-1/2``. Alpha is
    the share a node keeps of itself: 0.05 is 5 % own and 95 % propagated features. Equal to
    ``torch_geometric.nn.SSGConv`` with its defaults, entry (i, j) of the adjacency being the edge from j to i.

    Weights start with Glorot's uniform distribution and zero bias, as there.

    Source:
        Zhu and Koniusz 2021, "Simple spectral graph convolution", ICLR.
    """

    def __init__(self, in_features: int, out_features: int, alpha: float, hops: int) -> None:
        super().__init__()
        self.alpha, self.hops = alpha, hops
        self.linear = nn.Linear(in_features, out_features)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """Propagated features.

        Args:
            features: (..., nodes, in_features).
            adjacency: Weights >= 0, (..., nodes, nodes).

        Returns:
            (..., nodes, out_features).
        """
        return self.linear(self._propagation(adjacency) @ features)

    def _propagation(self, adjacency: Tensor) -> Tensor:
        """All hops as one matrix per graph: 19 x 19, cheaper than hopping with all features."""
        identity = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
        looped = adjacency + identity
        inverse_root = looped.sum(-1).rsqrt()  # the loop keeps every degree at 1 or more
        hop = inverse_root.unsqueeze(-1) * looped * inverse_root.unsqueeze(-2)
        power = total = hop
        for _ in range(self.hops - 1):
            power = power @ hop
            total = total + power
        return self.alpha * identity + (1 - self.alpha) / self.hops * total


class GraphStack(nn.Module):
    """SSGConv layers over each time step's graph: convolution, residual, layer norm, dropout.

    The first layer takes node features and positional encoding side by side and has no residual, its widths differ.
    As in the original, nothing but the norm is non-linear.

    Args:
        config: Sizes; ``node_features``, ``pe_dim`` and the ``gnn_*`` fields are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.node_features
        widths_in = [width + config.pe_dim] + [width] * (config.gnn_layers - 1)
        self.convs = nn.ModuleList(SSGConv(size, width, config.gnn_alpha, config.gnn_hops) for size in widths_in)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in widths_in)
        self.dropout = nn.Dropout(config.gnn_dropout)

    def forward(self, nodes_BTNF: Tensor, encoding_BTNK: Tensor, adjacency_BTNN: Tensor) -> Tensor:
        """(batch, time, nodes, node_features) from features of that shape, their encoding and their graphs."""
        features = torch.cat([nodes_BTNF, encoding_BTNK.to(nodes_BTNF.dtype)], dim=-1)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            mixed = conv(features, adjacency_BTNN)
            features = self.dropout(norm(mixed + features if index else mixed))
        return features
