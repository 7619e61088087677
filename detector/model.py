"""The V3 detector: from an EEG window to one seizure logit per sample."""

from torch import Tensor, nn

from detector.config import ModelConfig
from detector.edges import EdgeStream, assemble_adjacency, pairwise_cosine
from detector.graph import GraphStack, LaplacianPositionalEncoding
from detector.mamba import BiMambaStack
from detector.tcn import TcnEncoder, UpsamplingDecoder


class SeizureDetector(nn.Module):
    """Dual-stream detector: electrodes and their pairings evolve side by side, a graph network joins them.

    The encoder's features become ``num_channels`` nodes. The node stream follows each node through time, the edge
    stream follows the similarity of each pair of nodes (taken before the node stream) and yields a graph per time step,
    whose Laplacian eigenvectors tell the graph network where in the graph a node sits. "Nodes" are learned: the first
    convolution mixes all electrodes.

    Nothing here replaces or clips a non-finite value, the input included: it is the debugger's to see.

    Deviations from the original specification:
        * The encoder halves the rate stage by stage, where the original convolves at full rate and then strides by 16:
          a tenth of the work for the same span of time.
        * The edge stream's heads are 4 wide, not 8: its input projection is then 88 wide, a multiple of 8, as the fused
          kernel requires.
        * The streams norm before their mixers, not after, and the lift to edge features has a bias, see ``BiMamba2``
          and ``EdgeStream``.
        * No clamp on features, decoder output or logits. The loss is finite for every finite logit without.
        * ``pe_gradient`` is a choice; the original differentiates through the eigendecomposition.
        * The decoder's stages have ReLU between them; without, four stages would amount to one linear map.

    Initial values: those of torch for the 1x1 projections and the head, but with zero bias; the parts state theirs.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, flat = config.tcn_channels[-1], config.num_channels * config.node_features
        self.tcn = TcnEncoder(config)
        self.to_nodes = _pointwise(width, flat)
        self.node_stream = BiMambaStack(
            config.node_features, config.node_layers, config.node_d_state, config.node_headdim
        )
        self.edge_stream = EdgeStream(config)
        self.positional_encoding = LaplacianPositionalEncoding(config)
        self.graph = GraphStack(config)
        self.from_nodes = _pointwise(flat, width)
        self.decoder = UpsamplingDecoder(config)
        self.head = _pointwise(config.num_channels, 1)

    def forward(self, windows_BCL: Tensor) -> Tensor:
        """One logit per sample.

        Args:
            windows_BCL: EEG in standard deviations, (batch, num_channels, samples) at 256 Hz; samples are a positive
                multiple of the stride, 16.

        Returns:
            Logits, (batch, samples).

        Raises:
            ValueError: If the shape is another.
        """
        self._check_shape(windows_BCL)
        features_BFT = self.to_nodes(self.tcn(windows_BCL))
        # (B, T, N, F) and (B, N, T, F) are views: the streams and the graph make of them what they need.
        nodes_BNTF = features_BFT.unflatten(1, (self.config.num_channels, -1)).transpose(2, 3)
        adjacency_BTNN = self.adjacency(nodes_BNTF.transpose(1, 2))
        streamed_BNTF = self.node_stream(nodes_BNTF.flatten(0, 1)).view(nodes_BNTF.shape)
        encoding_BTNK = self.positional_encoding(adjacency_BTNN)
        mixed_BTNF = self.graph(streamed_BNTF.transpose(1, 2), encoding_BTNK, adjacency_BTNN)
        decoded_BCL = self.decoder(self.from_nodes(mixed_BTNF.flatten(2).transpose(1, 2)))
        return self.head(decoded_BCL).squeeze(1)

    def adjacency(self, nodes_BTNF: Tensor) -> Tensor:
        """The graph of every time step, (batch, time, nodes, nodes), from (batch, time, nodes, features)."""
        weights_BET = self.edge_stream(pairwise_cosine(nodes_BTNF))
        return assemble_adjacency(
            weights_BET,
            num_nodes=self.config.num_channels,
            top_k=self.config.top_k,
            threshold=self.config.edge_threshold,
        )

    def _check_shape(self, windows: Tensor) -> None:
        """Refuses what the convolutions would accept and answer wrongly."""
        channels, stride = self.config.num_channels, self.config.stride
        if windows.dim() != 3 or windows.shape[1] != channels:
            raise ValueError(f"windows must be (batch, {channels}, samples), got {tuple(windows.shape)}")
        if windows.shape[2] == 0 or windows.shape[2] % stride:
            raise ValueError(f"samples must be a positive multiple of {stride}, got {windows.shape[2]}")


def _pointwise(width: int, channels: int) -> nn.Conv1d:
    """A 1x1 convolution with zero bias."""
    conv = nn.Conv1d(width, channels, 1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv1d declares an optional bias
    return conv
