"""What a case of the corpus is: a training loop that anybody could have written, and what is true of it.

The truth is stated before the tracer sees the loop: it follows from the source that the case cites, or from the values
themselves. A line of a case that ends with the comment ``# here`` is the line to be named.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

ANY = None
"""Stands for a part of the truth on which the case says nothing."""


@dataclass
class Loop:
    """What is traced: ``with nanhunt.trace(model, optimizer): run()``.

    Attributes:
        model: The model; None where there is none to give.
        run: The loop; it may raise.
        optimizer: The optimizer, or None.
        raises: The exception that ``run`` ends in; None if it ends by itself.
        options: Further options of ``nanhunt.trace``.
    """

    model: nn.Module | None
    run: Callable[[], Any]
    optimizer: Optimizer | None = None
    raises: type[Exception] | tuple[type[Exception], ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """Where the fault is.

    Attributes:
        phase: forward, backward, optimizer, data or weights.
        op: Names of the aten operation that are right, such as ``aten::log``; ``ANY`` where no operation is to blame.
        module: Dotted path as in ``named_modules``; '' outside modules; ``ANY`` where that does not apply.
        has_line: Whether one line of the case is marked ``# here``.
        step: Optimizer step, from 0; ``ANY`` where it does not matter.
        micro_step: Part of an accumulated step.
        tensor: A word that the message must hold, such as the name of the tensor that was bad from the start.
    """

    phase: str
    op: tuple[str, ...] | None = ANY
    module: str | None = ANY
    has_line: bool = True
    step: int | None = ANY
    micro_step: int | None = ANY
    tensor: str = ""


@dataclass(frozen=True)
class Scenario:
    """One case: its name, where it is known from, how it is built, and its truth (None: nothing is wrong)."""

    name: str
    source: str
    build: Callable[[], Loop]
    truth: Truth | None
    slow: bool = False

    @property
    def file(self) -> str:
        """The file the case stands in."""
        return inspect.getsourcefile(self.build) or ""

    @property
    def line(self) -> int | None:
        """Number of the line to be named."""
        if self.truth is None or not self.truth.has_line:
            return None
        lines, first = inspect.getsourcelines(self.build)
        [number] = [n for n, text in enumerate(lines, first) if text.rstrip().endswith("# here")]
        return number


FAULTS: list[Scenario] = []
HARMLESS: list[Scenario] = []


def fault(source: str, *, slow: bool = False, **truth: Any) -> Callable[[Callable[[], Loop]], Callable[[], Loop]]:
    """Registers the decorated builder as a fault; its name is that of the function.

    Args:
        source: Where the failure is known from: an issue, a paper, or what makes it true.
        slow: Whether it takes more than two seconds.
        truth: The fields of ``Truth``.
    """

    def register(build: Callable[[], Loop]) -> Callable[[], Loop]:
        FAULTS.append(Scenario(build.__name__.replace("_", "-"), source, build, Truth(**truth), slow))
        return build

    return register


def harmless(source: str, *, slow: bool = False) -> Callable[[Callable[[], Loop]], Callable[[], Loop]]:
    """Registers the decorated builder as a look-alike in which nothing is wrong."""

    def register(build: Callable[[], Loop]) -> Callable[[], Loop]:
        HARMLESS.append(Scenario(build.__name__.replace("_", "-"), source, build, None, slow))
        return build

    return register
