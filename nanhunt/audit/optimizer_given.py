"""What an audit of an optimizer is given, and the numbers in it that nobody can mean."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.capture.checkpoint import Stored
from nanhunt.errors import NanhuntError


@dataclass
class Given:
    """What is audited.

    Attributes:
        title: For the report.
        model: The model.
        optimizer: Its optimizer.
        scheduler: Its schedule.
        batch: A batch.
        loss: The loss of a batch.
        max_grad_norm: Total norm that gradients are clipped to.
        says_clipping: Whether it is known that nothing is clipped where that is None.
        num_steps: Planned steps.
        warmup_steps: Said length of the warm-up.
        scaler: The loop's ``GradScaler``.
        others: Optimizers that hold other parameters of the model.
        stored: The file with the state; the optimizer is then our own, and may be given that state.
    """

    title: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: Any = None
    batch: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    max_grad_norm: float | None = None
    says_clipping: bool = False
    num_steps: int | None = None
    warmup_steps: int | None = None
    scaler: Any = None
    others: tuple[Optimizer, ...] = ()
    stored: Stored | None = None

    def check(self, owner: str = "") -> None:
        """Refuses what no audit can be made of.

        Args:
            owner: Put before the name of a number, such as ``target mymodel:target: ``.

        Raises:
            NanhuntError: If a number is out of its range, or the optimizer has no groups.
        """
        if not isinstance(self.model, nn.Module):
            raise NanhuntError(f"{owner}the model is a {type(self.model).__name__}, not a torch.nn.Module")
        if not isinstance(self.optimizer, Optimizer):
            raise NanhuntError(f"{owner}the optimizer is a {type(self.optimizer).__name__}, not a torch optimizer")
        if not self.optimizer.param_groups:
            raise NanhuntError(f"{owner}the optimizer has no parameter groups", help="it holds nothing to step")
        _check_steps(f"{owner}num_steps", self.num_steps, least=1)
        _check_steps(f"{owner}warmup_steps", self.warmup_steps, least=0)
        norm = self.max_grad_norm
        if norm is None:
            return
        if isinstance(norm, bool) or not isinstance(norm, Real) or math.isnan(norm) or norm <= 0:
            raise NanhuntError(
                f"{owner}max_grad_norm is {norm!r}; it must be a number above 0", help="None: nothing is clipped"
            )


def _check_steps(name: str, value: Any, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
        raise NanhuntError(f"{name} is {value!r}; it must be a whole number of at least {least}")
