"""The model and the optimizers of a loop, as far as they are known, and the names of what they hold."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class KnownState:
    """What a loop trains.

    Args:
        model: The model; None until one was seen.
        optimizer: One optimizer, several, or None.

    Raises:
        TypeError: If it is none of these.
    """

    def __init__(self, model: nn.Module | None, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
        self.model = model
        self.optimizers = _optimizers(optimizer)
        self._parameter_names: dict[int, str] = {}

    def named_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, name and value of every parameter and buffer of the model."""
        if self.model is not None:
            for name, parameter in self.model.named_parameters():
                yield "parameter", name, parameter
            for name, buffer in self.model.named_buffers():
                yield "buffer", name, buffer

    def parameters(self) -> Iterator[Tensor]:
        """The parameters of the model and of all optimizers, each once."""
        seen: set[int] = set()
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        own = list(self.model.parameters()) if self.model is not None else []
        for parameter in (parameter for part in (own, *groups) for parameter in part):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    def has_gradients(self) -> bool:
        """Whether any of them has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters())

    def names_of(self, optimizer: Optimizer) -> dict[int, str]:
        """Names of the model's parameters by identity, worked out anew when the optimizer holds an unknown one."""
        if any(id(parameter) not in self._parameter_names for parameter in optimizer.param_groups[-1]["params"]):
            named = {id(tensor): name for kind, name, tensor in self.named_tensors() if kind == "parameter"}
            groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            outside = {id(parameter): f"parameter {number}" for number, parameter in enumerate(groups)}
            self._parameter_names = {**self._parameter_names, **outside, **named}
        return self._parameter_names


def _optimizers(given: Any) -> list[Optimizer]:
    """One optimizer, several, or none, as a list."""
    found = [] if given is None else [given] if not isinstance(given, list | tuple) else list(given)
    for optimizer in found:
        # Wrappers of frameworks are no subclasses; what the hooks need are the groups and the state.
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, not {type(optimizer).__name__}")
    return found
