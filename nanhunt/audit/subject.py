"""What is audited: a model with its optimizer and a batch, from a target, a capture or a checkpoint."""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from nanhunt.capture.checkpoint import Stored, read_stored
from nanhunt.errors import CaptureError, NanhuntError, TargetError, first_line
from nanhunt.targets import Target, find_target

_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


@dataclass(frozen=True)
class Subject:
    """What an audit is given.

    Attributes:
        name: The file or the target, for the report's title.
        stored: What was read from a file; None without one.
        target: Builds the model; None for a checkpoint whose model nobody names.
        seed: Seed of fresh weights.
    """

    name: str
    stored: Stored | None
    target: Target | None
    seed: int = 0

    def model(self) -> nn.Module:
        """A model of the target, with the stored weights where there are some.

        Raises:
            TargetError: If there is no target, or the weights are of another model.
        """
        target = self._needed("to build the model")
        model = target.build(self.seed)
        if self.stored is not None and self.stored.weights is not None:
            _load(model, self.stored, target)
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The target's optimizer for this model, as it is when training begins: without the stored state.

        Raises:
            TargetError: If the target offers none.
        """
        target = self._needed("to make the optimizer")
        if not target.has_optimizer:
            raise TargetError(f"target {target.name} has no optimizer(model)")
        optimizer = target.optimizer(model)
        if not isinstance(optimizer, Optimizer):
            raise TargetError(f"target {target.name} gives a {type(optimizer).__name__}, not a torch optimizer")
        return optimizer

    def batch(self) -> Any | None:
        """The captured batch, else one that the target makes, else None."""
        if self.stored is not None and self.stored.capture is not None and self.stored.capture.batches:
            return self.stored.capture.batches[0]
        return self.target.control_batch(self.seed) if self.target is not None else None

    def _needed(self, why: str) -> Target:
        if self.target is None:
            raise TargetError(f"no target {why} of {self.name}", help="give --target module:attribute")
        return self.target


def find_subject(
    file: Path | None = None, target: str | Any = None, config: Path | None = None, seed: int = 0
) -> Subject:
    """What a command line names.

    Args:
        file: A capture or a checkpoint; None for the target's fresh weights.
        target: ``module:attribute``, an installed name, or a target object; None for the one the file names.
        config: A file with the target's configuration, .json, .toml or .yaml; None for that of the file.
        seed: Seed of fresh weights.

    Raises:
        CaptureError: If the file cannot be read.
        TargetError: If no target fits.
        NanhuntError: If the configuration cannot be read.
    """
    stored = read_stored(file) if file is not None else None
    found = _find_target(stored, target)
    values = read_config(config) if config is not None else stored.config if stored is not None else None
    if found is not None:
        if config is not None and not hasattr(found.source, "configure"):
            raise TargetError(f"target {found.name} takes no configuration", help="it has no configure(config)")
        found = found.configured(values)
    elif config is not None:
        raise TargetError("a configuration needs a target", help="give --target module:attribute")
    return Subject(str(file) if file is not None else found.name if found else "", stored, found, seed)


def read_config(file: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        NanhuntError: If it cannot be read or is no table.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise NanhuntError(f"{file} is no configuration file", help=f"it ends with one of {', '.join(_READERS)}")
    try:
        values = reader(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NanhuntError(f"no such file: {file}") from error
    # Each format has its own kinds of errors.
    except Exception as error:
        raise NanhuntError(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise NanhuntError(f"{file} holds a {type(values).__name__}, not a table of settings")
    return values


def _find_target(stored: Stored | None, target: str | Any) -> Target | None:
    if target is not None and not isinstance(target, str):
        return target if isinstance(target, Target) else Target(type(target).__name__, target)
    if target is not None or stored is None:
        return find_target(target)
    recorded: Mapping[str, Any] | None = stored.capture.meta.get("target") if stored.capture is not None else None
    # A checkpoint says nothing of the model it belongs to; taking an installed target for it would be a guess.
    if recorded is None and not (stored.capture is not None and stored.capture.is_legacy):
        return None
    return find_target(None, recorded)


def _load(model: nn.Module, stored: Stored, target: Target) -> None:
    assert stored.weights is not None
    try:
        with torch.no_grad():
            missing, unexpected = model.load_state_dict(stored.weights, strict=False)
    except RuntimeError as error:
        line = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), first_line(error))
        raise CaptureError(
            f"{stored.path} does not fit target {target.name}: {line}", help="check --target and --config"
        ) from error
    parameters = dict(model.named_parameters())
    missing = [name for name in missing if name in parameters]
    if missing or unexpected:
        what = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise CaptureError(
            f"{stored.path} is of another model than target {target.name}: {what}", help="check --target and --config"
        )
