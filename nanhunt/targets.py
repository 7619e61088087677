"""Finding and building what is debugged: a model, its optimizer and its loss.

A target is any object with ``build(seed) -> nn.Module``; a function that returns a module is one as well. What else
it may offer: ``optimizer(model)``, ``loss(model, batch)`` (a tensor, or a dict of named terms that are added),
``max_grad_norm``,
``config`` (JSON data, stored in captures), ``configure(config)`` (the target such a config describes),
``control_batch(seed)``, and ``variants()`` (named alternatives of the model that take the same weights).
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.errors import NanhuntError, TargetError, first_line

GROUP = "nanhunt.targets"


@dataclass(frozen=True)
class Target:
    """A target with its name; asks the object behind it and turns failures into one line.

    Attributes:
        name: Entry point or ``module:attribute``.
        source: The object that was found.
    """

    name: str
    source: Any

    @property
    def has_loss(self) -> bool:
        """Whether the loss can be computed from a batch."""
        return hasattr(self.source, "loss")

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer can be built."""
        return hasattr(self.source, "optimizer")

    @property
    def max_grad_norm(self) -> float | None:
        """Total norm that gradients are clipped to before the step; None where the target does not say."""
        return getattr(self.source, "max_grad_norm", None)

    def build(self, seed: int) -> nn.Module:
        """The model with fresh weights.

        Raises:
            TargetError: If building fails or gives no module.
        """
        torch.manual_seed(seed)
        build = getattr(self.source, "build", self.source)
        try:
            model = build(seed) if hasattr(self.source, "build") else build()
        except NanhuntError:
            raise
        except Exception as error:
            failed = self._failed("cannot be built", error)
            if isinstance(self.source, type) and not issubclass(self.source, nn.Module):
                failed.help = "it is a class: name an instance of it, as in `target = Target()`"
            raise failed from error
        if not isinstance(model, nn.Module):
            raise TargetError(f"target {self.name} built a {type(model).__name__}, not a torch.nn.Module")
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the model.

        Raises:
            TargetError: If it cannot be made.
        """
        try:
            return self.source.optimizer(model)
        except NanhuntError:
            raise
        except Exception as error:
            raise self._failed("gives no optimizer", error) from error

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch; named terms are added."""
        value = self.source.loss(model, batch)
        return sum(value.values(), torch.zeros(())) if isinstance(value, Mapping) else value

    def control_batch(self, seed: int) -> Any | None:
        """A batch that has nothing to do with the failing run, or None if the target makes none.

        Raises:
            TargetError: If making one fails.
        """
        make = getattr(self.source, "control_batch", None)
        try:
            return make(seed) if make is not None else None
        except Exception as error:
            raise self._failed("gives no control batch", error) from error

    def variants(self) -> dict[str, "Target"]:
        """Alternatives of the model that take the same weights, by what they change."""
        offered: dict[str, Any] = getattr(self.source, "variants", dict)()
        return {title: Target(f"{self.name} ({title})", source) for title, source in offered.items()}

    def configured(self, config: Mapping[str, Any] | None) -> "Target":
        """The same target with the configuration that a capture carries."""
        if config is None or not hasattr(self.source, "configure"):
            return self
        try:
            return Target(self.name, self.source.configure(config))
        except Exception as error:
            raise self._failed("does not take the capture's configuration", error) from error

    def _failed(self, what: str, error: Exception) -> TargetError:
        return TargetError(f"target {self.name} {what}: {type(error).__name__}: {first_line(error)}")


def find_target(spec: str | None, recorded: Mapping[str, Any] | None = None) -> Target:
    """The target named on the command line, else the one a capture recorded, else the only one there is.

    A name inside a capture is looked up among the installed entry points only: a file never decides which module is
    imported.

    Args:
        spec: ``module:attribute`` or the name of an entry point in the group ``nanhunt.targets``.
        recorded: ``{"name": ..., "config": ...}`` as a capture carries it.

    Raises:
        TargetError: If nothing fits.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    recorded = recorded or {}
    name, config = recorded.get("name"), recorded.get("config")
    if spec is not None:
        if spec in installed:
            return _load(installed[spec]).configured(config if name == spec else None)
        if ":" in spec:
            return Target(spec, _import(spec))
        raise TargetError(f"no target {spec!r}", help=f"give module:attribute or one of: {_names(installed)}")
    if isinstance(name, str) and name in installed:
        return _load(installed[name]).configured(config)
    if name:
        raise TargetError(
            f"the capture was made with the target {name!r}, which is not installed", help="give --target"
        )
    plain_names = [name for name in installed if "." not in name]
    if len(plain_names) == 1:
        return _load(installed[plain_names[0]])
    raise TargetError(
        "the capture names no target", help=f"give --target module:attribute or one of: {_names(installed)}"
    )


def _names(installed: Mapping[str, EntryPoint]) -> str:
    return ", ".join(sorted(installed)) or "none installed"


def _load(point: EntryPoint) -> Target:
    try:
        return Target(point.name, point.load())
    except Exception as error:
        raise TargetError(
            f"target {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error


def _import(spec: str) -> Any:
    module_name, _, path = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"target {spec!r}: cannot import {module_name}: {first_line(error)}", help="is its folder on PYTHONPATH?"
        ) from error
    # The user's own module runs here and may fail in any way; a script without a main guard exits.
    except (Exception, SystemExit) as error:
        raise TargetError(
            f"target {spec!r}: importing {module_name} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise TargetError(f"target {spec!r}: {module_name} has no attribute {path}")
        found = getattr(found, part)
    return found
