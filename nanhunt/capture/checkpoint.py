"""Checkpoints from disk: weights, optimizer state and what else a trainer has put beside them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nanhunt.capture.format import Capture, load_archive, read_capture
from nanhunt.errors import CaptureError

# What trainers call the two: plain loops, Lightning, timm, fairseq.
_WEIGHTS = ("model_state_dict", "state_dict", "model")
_OPTIMIZERS = ("optimizer_state_dict", "optimizer", "optimizer_states")
_SCHEDULERS = ("scheduler_state_dict", "lr_scheduler", "scheduler", "lr_schedulers")
_STEPS = ("step", "global_step")

# DistributedDataParallel and torch.compile each prefix every name.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Stored:
    """What a capture or a checkpoint says of a run.

    Attributes:
        path: The file.
        weights: Parameters and buffers by name; None where there are none.
        optimizer: The optimizer's state dict as it stands in the file; None where there is none.
        scheduler: The learning-rate schedule's state dict; None where there is none.
        step: Optimizer steps taken; None where the file does not say.
        config: The target's configuration; None where the file has none.
        capture: The whole capture, where it is one.
    """

    path: Path
    weights: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    step: int | None = None
    config: dict[str, Any] | None = None
    capture: Capture | None = field(default=None, repr=False)


def read_stored(path: Path) -> Stored:
    """What is in a capture, or in a checkpoint of some trainer.

    Raises:
        CaptureError: If the file cannot be read, or holds neither.
    """
    content = load_archive(path)
    if isinstance(content, dict) and ("nanhunt_capture" in content or {"windows", "labels"} <= set(content)):
        return _of_capture(path, read_capture(path))
    config = content.get("config") if isinstance(content, dict) else None
    optimizer = _entry(content, _OPTIMIZERS)
    is_optimizer = isinstance(content, dict) and {"state", "param_groups"} <= set(content)
    return Stored(
        path=path,
        weights=None if is_optimizer else _weights(path, content),
        optimizer=content if is_optimizer else optimizer,
        scheduler=_entry(content, _SCHEDULERS),
        step=next((content[key] for key in _STEPS if type(content.get(key)) is int), None),
        config=config if isinstance(config, dict) else None,
    )


def _of_capture(path: Path, capture: Capture) -> Stored:
    target = capture.meta.get("target") or {}
    return Stored(
        path=path,
        weights=capture.payload.get("model"),
        optimizer=capture.payload.get("optimizer"),
        step=capture.step,
        config=target.get("config"),
        capture=capture,
    )


def _entry(content: Any, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The first of these entries; the first of a list, as Lightning writes one for each optimizer."""
    for key in keys:
        value = content.get(key) if isinstance(content, dict) else None
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict):
            return value
    return None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The model weights of a checkpoint, by name.

    Raises:
        CaptureError: If the file cannot be read or holds no state dict.
    """
    return _weights(path, load_archive(path))


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    for key in _WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content.items())):
        raise CaptureError(
            f"{path} holds no model weights", help="expected a state dict, or model_state_dict inside one"
        )
    while prefix := next((one for one in _WRAPPERS if all(name.startswith(one) for name in content)), ""):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
