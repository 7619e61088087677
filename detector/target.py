"""The detector as nanhunt's debugging target: how to build its model, optimizer and loss again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from detector.config import PRESETS, DetectorConfig
from detector.losses import focal_loss
from detector.model import SeizureDetector
from detector.optim import build_optimizer, build_scheduler
from detector.windows import Batch, synthetic_batches


@dataclass(frozen=True)
class DetectorTarget:
    """One configuration of the detector."""

    detector_config: DetectorConfig

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as JSON data, for captures and checkpoints."""
        return self.detector_config.to_dict()

    @property
    def max_grad_norm(self) -> float:
        """Total gradient norm that the trainer clips to."""
        return self.detector_config.train.max_grad_norm

    def configure(self, config: Mapping[str, Any]) -> Self:
        """The target that a stored configuration describes."""
        return replace(self, detector_config=DetectorConfig.from_dict(config))

    def build(self, seed: int) -> nn.Module:
        """The model with the initial weights of this seed."""
        torch.manual_seed(seed)
        return SeizureDetector(self.detector_config.model)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The trainer's optimizer."""
        return build_optimizer(model, self.detector_config.train)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The trainer's learning-rate schedule."""
        return build_scheduler(optimizer, self.detector_config.train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The trainer's loss, ()."""
        train = self.detector_config.train
        logits = model(batch["windows"])
        return focal_loss(logits, batch["labels"], alpha=train.focal_alpha, gamma=train.focal_gamma)

    def control_batch(self, seed: int) -> Batch:
        """A batch of synthetic windows."""
        return next(synthetic_batches(replace(self.detector_config.train, seed=seed)))

    def variants(self) -> dict[str, "DetectorTarget"]:
        """The same weights with one design choice taken the other way."""
        model = self.detector_config.model
        if model.pe_gradient == "detached":
            return {}
        detached = replace(self.detector_config, model=replace(model, pe_gradient="detached"))
        return {"positional encoding detached": DetectorTarget(detached)}


v3 = DetectorTarget(PRESETS["v3"])
incident = DetectorTarget(PRESETS["incident"])
small = DetectorTarget(PRESETS["small"])
small_incident = DetectorTarget(PRESETS["small-incident"])
