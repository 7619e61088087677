"""Some steps of an animal under an observer, and everything about them that could have changed."""

import random
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from observers import OBSERVERS, Observer, unobserved
from surroundings import attached, bits, differences, generators, held, process
from torch import nn
from torch.optim import Optimizer
from zoo import ZOO
from zoo_entry import Entry, Training

NUM_STEPS = 3


@dataclass
class Run:
    """What was seen of a run.

    Attributes:
        values: Losses, gradients, weights, buffers, moments and generators, as bits by name.
        hooks: Numbers of hooks and names of attributes that are left on modules, parameters and optimizers.
        left: What is not as it was in the process, or on the model as soon as the last step is over.
        complaints: Findings of the observer, its own failures, files it wrote.
    """

    values: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is one of those a step can draw from


def hooks_on(training: Training) -> dict[str, Any]:
    """What hangs on the model, on copies of it, and on the optimizers."""
    copies = {name: item for name, item in training.extras.items() if isinstance(item, nn.Module)}
    others = [item for item in training.extras.values() if isinstance(item, Optimizer)]
    found = attached(training.model, training.optimizer, *others)
    for name, model in copies.items():
        found |= {f"{name}: {what}": value for what, value in attached(model).items()}
    return found


def run(entry: Entry, observer: Observer, *, times: int = 1) -> Run:
    """The steps under one observer after the other, as many times as told."""
    seed_everything(5)
    training, seen = entry.begin(5), Run()
    before = process()
    with tempfile.TemporaryDirectory() as folder:
        for begin in range(0, times * NUM_STEPS, NUM_STEPS):
            with observer(training.model, training.optimizer, Path(folder)) as observed:
                for number in range(begin, begin + NUM_STEPS):
                    seen.values |= _step(entry, training, number)
            seen.complaints += observed.complaints()
        seen.left = differences(process(), before)
        seen.values |= held(training.model, training.optimizer, training.extras) | generators()
        seen.hooks = hooks_on(training)
    return seen


def _step(entry: Entry, training: Training, number: int) -> dict[str, Any]:
    loss = entry.step(training, entry.batch(number))
    named = training.model.named_parameters()
    gradients = {f"{number} gradient of {name}": bits(parameter.grad) for name, parameter in named}
    return gradients | {f"{number} loss": bits(loss.detach())}


@cache
def run_of(name: str, observer: str = "") -> Run:
    """The run of an animal under the observer of this name, or under none; run once and looked at by several tests."""
    return run(ZOO[name], OBSERVERS[observer] if observer else unobserved)
