"""Sizes and settings of the detector and its trainer, and the presets that name them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, Self

FS_HZ = 256.0
"""Sampling rate of everything the model sees, in Hz."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the V3 detector.

    Attributes:
        num_channels: EEG channels in and graph nodes inside.
        tcn_channels: Width of each encoder stage; each stage halves the rate, the decoder mirrors it.
        tcn_kernel_size: Taps of every dilated convolution; odd.
        tcn_dropout: Dropout probability after each encoder layer.
        node_features: Features per node, the node stream's d_model.
        node_layers: BiMamba2 layers of the node stream.
        node_d_state: State size of the node stream.
        node_headdim: Head size of the node stream.
        edge_features: Features per node pair, the edge stream's d_model.
        edge_layers: BiMamba2 layers of the edge stream.
        edge_d_state: State size of the edge stream.
        edge_headdim: Head size of the edge stream. The seed says 8, which makes the input projection 84 wide; the fused
            CUDA kernel needs a multiple of 8, which 4 gives (88).
        top_k: Strongest edges kept per node before the adjacency is made symmetric.
        edge_threshold: Edge weights at or below it are dropped.
        pe_dim: Laplacian eigenvectors given to the first graph layer.
        pe_gradient: Whether the loss differentiates through the eigendecomposition.
        laplacian_shift: Multiple of the identity added to the Laplacian. It moves all eigenvalues alike and so never
            separates two of them; the incident had 1e-5.
        semi_dynamic_interval: Compute the encoding at every n-th time step and hold it in between.
        gnn_layers: SSGConv layers.
        gnn_alpha: Share of a node's own features in each SSGConv.
        gnn_hops: Propagation steps of each SSGConv.
        gnn_dropout: Dropout probability after each graph layer.
    """

    num_channels: int = 19
    tcn_channels: tuple[int, ...] = (64, 128, 256, 512)
    tcn_kernel_size: int = 7
    tcn_dropout: float = 0.15
    node_features: int = 64
    node_layers: int = 2
    node_d_state: int = 8
    node_headdim: int = 8
    edge_features: int = 16
    edge_layers: int = 2
    edge_d_state: int = 8
    edge_headdim: int = 4
    top_k: int = 3
    edge_threshold: float = 1e-4
    pe_dim: int = 16
    pe_gradient: Literal["detached", "through_eigh"] = "detached"
    laplacian_shift: float = 0.0
    semi_dynamic_interval: int = 1
    gnn_layers: int = 2
    gnn_alpha: float = 0.05
    gnn_hops: int = 2
    gnn_dropout: float = 0.1

    @property
    def stride(self) -> int:
        """Input samples per time step of the streams."""
        return 2 ** len(self.tcn_channels)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the detector is trained.

    Attributes:
        window_s: Length of one training window, in seconds.
        batch_size: Windows per step.
        learning_rate: Peak rate of AdamW.
        weight_decay: Decoupled weight decay, per unit of learning rate.
        decay_groups: ``by_module_type`` spares norms, biases, embeddings and the Mamba-2 parameters A_log, D and
            dt_bias; ``single`` decays every parameter, as the incident did.
        warmup_steps: Steps of linear warm-up; the first step runs at ``1 / warmup_steps`` of the peak.
        schedule_steps: Length of the whole schedule: the cosine reaches zero there.
        max_grad_norm: Total gradient norm above which gradients are scaled down.
        focal_alpha: Weight of the seizure class, 0 to 1.
        focal_gamma: Focusing exponent.
        finite_check: Whether ``nanhunt.watch`` looks at every step before the optimizer moves the weights.
        seed: Seed of the initial weights, the dropout masks and the synthetic data.
    """

    window_s: float = 60.0
    batch_size: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    decay_groups: Literal["by_module_type", "single"] = "by_module_type"
    warmup_steps: int = 100
    schedule_steps: int = 10_000
    max_grad_norm: float = 0.5
    focal_alpha: float = 0.5
    focal_gamma: float = 2.0
    finite_check: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """A model and how it is trained; what a capture and a checkpoint carry along."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that it can be written as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The configuration that ``to_dict`` wrote.

        Raises:
            ValueError: If a section or field is unknown.
        """
        unknown = set(data) - {"model", "train"}
        if unknown:
            raise ValueError(f"unknown configuration section {sorted(unknown)}; known: model, train")
        model = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.get("model", {}).items()
        }
        return cls(model=_build(ModelConfig, model), train=_build(TrainConfig, data.get("train", {})))


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass, or a ValueError naming the field it does not have."""
    known = {item.name for item in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"unknown configuration field {unknown[0]!r} in {cls.__name__}; known: {', '.join(sorted(known))}"
        )
    return cls(**values)


V3 = DetectorConfig()

# The incident trained with gradients through the eigendecomposition, one AdamW group and no finite check. Its warm-up
# was a tenth of 100 epochs of 15,404 batches, so for thousands of steps the weights hardly left their initial values.
INCIDENT = DetectorConfig(
    model=replace(V3.model, pe_gradient="through_eigh", laplacian_shift=1e-5),
    train=replace(
        V3.train,
        decay_groups="single",
        finite_check=False,
        learning_rate=5e-5,
        warmup_steps=154_040,
        schedule_steps=1_540_400,
    ),
)

_SMALL_WIDTHS: dict[str, Any] = {
    "tcn_channels": (8, 12, 16, 24),
    "node_features": 16,
    "node_layers": 1,
    "node_headdim": 4,
    "edge_features": 4,
    "edge_layers": 1,
    "edge_d_state": 4,
    "edge_headdim": 1,
}
_SMALL_WINDOWS: dict[str, Any] = {"window_s": 10.0, "batch_size": 4}

SMALL = DetectorConfig(
    model=replace(V3.model, **_SMALL_WIDTHS),
    train=replace(V3.train, **_SMALL_WINDOWS, learning_rate=1e-3, warmup_steps=10),
)
SMALL_INCIDENT = DetectorConfig(
    model=replace(INCIDENT.model, **_SMALL_WIDTHS), train=replace(INCIDENT.train, **_SMALL_WINDOWS)
)

PRESETS: Mapping[str, DetectorConfig] = MappingProxyType(
    {"v3": V3, "incident": INCIDENT, "small": SMALL, "small-incident": SMALL_INCIDENT}
)
