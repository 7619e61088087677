"""Ten thousand steps under an observer: it keeps no tensor of a step that is over, and no record for each step."""

import contextlib
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import pytest
import torch
from observers import OBSERVERS, Observed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

NUM_STEPS = 10_000
EARLY, LATE = range(1_000, 2_000), range(9_000, NUM_STEPS)
"""Two stretches whose lowest counts are compared: what is cleared from time to time goes up and down in between."""

LOOK_EVERY, FOLLOW_EVERY = 20, 499
MAX_GROWTH = 1_000
"""Objects more in the late stretch than in the early one; a single one kept per step would make 8,000."""

MAX_ALIVE = 9
"""Results that may be alive when the loop is over: a few of the last step, which the watch holds for a capture."""


@dataclass
class Counts:
    """What there is at one moment.

    Attributes:
        blocks: Small pieces of memory that Python holds.
        tensors: Tensors that Python knows of.
        records: Entries in the containers that can be reached from the observer.
    """

    blocks: int
    tensors: int
    records: int


@dataclass(repr=False)
class Soak:
    """The lowest counts of both stretches, and the results that were followed."""

    early: Counts = field(default_factory=lambda: Counts(*[sys.maxsize] * 3))
    late: Counts = field(default_factory=lambda: Counts(*[sys.maxsize] * 3))
    results: list[StorageWeakRef] = field(default_factory=list)

    def look(self, number: int, observer: Any) -> None:
        """Counts after the step of this number, if it is in one of the stretches."""
        lowest = self.early if number in EARLY else self.late if number in LATE else None
        if lowest is not None and number % LOOK_EVERY == 0:
            for what, count in vars(counted(observer)).items():
                setattr(lowest, what, min(count, getattr(lowest, what)))

    def follow(self, number: int, results: tuple[Tensor, ...]) -> None:
        """Remembers where the results of some steps are in memory, without holding it."""
        if number % FOLLOW_EVERY == 0 or number >= NUM_STEPS - 20:
            self.results += [StorageWeakRef(result.untyped_storage()) for result in results]

    @property
    def growth(self) -> dict[str, int]:
        """How much higher the lowest counts of the late stretch are."""
        early = vars(self.early)
        return {what: count - early[what] for what, count in vars(self.late).items()}

    @property
    def num_alive(self) -> int:
        """Followed results whose memory is still there, whichever object holds it."""
        return sum(not result.expired() for result in self.results)


def _inside(value: Any) -> list[Any]:
    """What a value of the observer holds itself; nothing of the model, of torch or of code."""
    if isinstance(value, FunctionType):
        return list(value.__closure__ or ())
    if isinstance(value, CellType | MethodType | dict | list | tuple | set | frozenset | deque):
        return gc.get_referents(value)
    if isinstance(value, type | nn.Module | Optimizer | Tensor | BuiltinFunctionType) or not hasattr(value, "__dict__"):
        return []
    return [vars(value)] if type(value).__module__.startswith(("nanhunt", "collections")) else []


def num_records(observer: Any) -> int:
    """Entries of all containers that can be reached from the observer."""
    seen: set[int] = set()
    waiting, total = [observer], 0
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        total += len(value) if isinstance(value, dict | list | tuple | set | frozenset | deque) else 0
        waiting.extend(_inside(value))
    return total


def counted(observer: Any) -> Counts:
    gc.collect()
    # By type, for isinstance would wake what stands for a module that is not imported yet.
    tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
    return Counts(sys.getallocatedblocks(), tensors, num_records(observer))


def soak(observe: Any, folder: Path, *, each_step: Callable[[Tensor], None] = lambda output: None) -> tuple[Soak, Any]:
    torch.manual_seed(0)
    model, soaked = nn.Linear(2, 1), Soak()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows = torch.randn(4, 2)
    with observe(model, optimizer, folder) as observed:
        for number in range(NUM_STEPS):
            optimizer.zero_grad()
            batch = rows.clone()
            output = model(batch)
            loss = output.square().mean()
            loss.backward()
            optimizer.step()
            each_step(output)
            soaked.follow(number, (batch, output, loss))
            soaked.look(number, observed.observer)
    del batch, output, loss
    return soaked, observed


@pytest.fixture(autouse=True)
def _only_what_comes_now_is_collected() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["watch", "watch-trace-finite", "trace"])
def test_ten_thousand_steps_are_forgotten(observer: str, tmp_path: Path):
    soaked, observed = soak(OBSERVERS[observer], tmp_path)

    assert soaked.num_alive <= MAX_ALIVE
    assert soaked.growth["tensors"] <= 0
    assert soaked.growth["records"] <= MAX_GROWTH
    assert soaked.growth["blocks"] <= MAX_GROWTH
    assert observed.complaints() == []


@pytest.mark.slow
def test_the_counts_see_what_is_kept_of_each_step(tmp_path: Path):
    kept: list[Any] = []

    @contextlib.contextmanager
    def keeping(model: nn.Module, optimizer: Optimizer, folder: Path) -> Iterator[Observed]:
        yield Observed(kept, list)

    soaked, _ = soak(keeping, tmp_path, each_step=lambda output: kept.append(output.detach()))

    assert soaked.num_alive > MAX_ALIVE
    assert [what for what, growth in soaked.growth.items() if growth < 8_000] == []
