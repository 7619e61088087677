"""The optimizer's parameter groups and the learning-rate schedule."""

import math
from typing import Any, Literal

import torch
from torch import nn

from detector.config import TrainConfig

# Modules whose ``weight`` is a linear map; only those are decayed. Everything else sets a scale, an offset or a rate.
_LINEAR_MAPS = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_groups: Literal["by_module_type", "single"]
) -> list[dict[str, Any]]:
    """Groups for AdamW that hold every trainable parameter exactly once.

    Args:
        model: The model.
        weight_decay: Decay of the decayed group.
        decay_groups: ``by_module_type`` decays the weights of linear maps and convolutions and nothing else: by the
            type of the owning module, since names lie (a layer called ``dbnet`` holds "bn", a norm may be called
            ``seq.1``). ``single`` decays everything.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_groups == "single":
        return [{"params": trainable, "weight_decay": weight_decay}]
    maps = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, _LINEAR_MAPS) and not getattr(module.weight, "_no_weight_decay", False)
    }
    return [
        {"params": [p for p in trainable if id(p) in maps], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in maps], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.999 and eps 1e-8."""
    groups = parameter_groups(model, config.weight_decay, decay_groups=config.decay_groups)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate_factor(step: int, *, warmup_steps: int, schedule_steps: int) -> float:
    """Share of the peak rate at a step from 0: ``(step + 1) / warmup_steps``, then a cosine to zero at the end."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, schedule_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up and cosine, stepped once per optimizer step; the first step runs at the first warm-up rate."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, warmup_steps=config.warmup_steps, schedule_steps=config.schedule_steps),
    )
