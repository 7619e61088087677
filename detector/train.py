"""The trainer: one loop that can fail honestly."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nanhunt
from detector.config import DetectorConfig
from detector.optim import build_scheduler
from detector.target import DetectorTarget
from detector.windows import Batch
from nanhunt.errors import NanhuntError
from nanhunt.files import write_whole


class DivergedError(NanhuntError):
    """An unwatched run could not go on: its own weights or values made an operation refuse its input."""

    exit_code = 1


@dataclass(frozen=True)
class StepStats:
    """What the progress bar shows of one step.

    Attributes:
        step: Optimizer step, from 0.
        loss: Mean focal loss, nats.
        gradient_norm: Total norm before clipping.
        learning_rate: Of this step.
        windows_per_second: Since the run began.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    windows_per_second: float


class Trainer:
    """Trains the detector on batches of windows.

    Args:
        config: Model and training settings.
        target_name: What a capture shall call the target, so that it can be rebuilt from an installed name.
    """

    def __init__(self, config: DetectorConfig, *, target_name: str = "detector") -> None:
        self.config, self.target_name = config, target_name
        self.target = DetectorTarget(config)
        self.model: nn.Module = self.target.build(config.train.seed)
        self.optimizer = self.target.optimizer(self.model)
        self.scheduler = build_scheduler(self.optimizer, config.train)
        self.num_steps_done = 0

    def run(
        self,
        batches: Iterable[Batch],
        *,
        num_steps: int,
        on_step: Callable[[StepStats], None] = lambda stats: None,
        out_dir: Path = Path("debug"),
        on_fault: str = "raise",
        trace_finite: bool = False,
    ) -> None:
        """Takes ``num_steps`` optimizer steps.

        Args:
            batches: At least ``num_steps`` batches.
            num_steps: Steps to take.
            on_step: Called after each step.
            out_dir: Folder for the captures.
            on_fault: ``raise``, ``skip`` or ``record``, see ``nanhunt.watch``.
            trace_finite: Follow every module; also switches the finite check on where the configuration has it off.

        Raises:
            NonFiniteStep: If a watched step is non-finite and ``on_fault`` is ``raise``.
            DivergedError: If an unwatched run ends non-finite, or in an operation that refuses non-finite input.
        """
        watched = self.config.train.finite_check or trace_finite
        watch = self._watch(out_dir, on_fault, trace_finite) if watched else None
        try:
            with watch or contextlib.nullcontext():
                self._loop(islice(watch.batches(batches) if watch else batches, num_steps), on_step)
        except torch.linalg.LinAlgError as error:
            raise self._diverged(str(error).splitlines()[0]) from error
        if not watched and not self._weights_are_finite():
            raise self._diverged("nothing looked at the steps")

    def _loop(self, batches: Iterable[Batch], on_step: Callable[[StepStats], None]) -> None:
        started, num_windows = time.perf_counter(), 0
        for batch in batches:
            loss, norm = self.train_step(batch)
            rate = float(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
            self.num_steps_done += 1
            num_windows += len(batch["windows"])
            speed = num_windows / (time.perf_counter() - started)
            on_step(StepStats(self.num_steps_done - 1, loss, norm, rate, speed))

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; the loss and the gradient norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.target.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def save(self, path: Path) -> None:
        """Writes weights, optimizer, schedule, step and configuration, whole or not at all.

        Raises:
            NanhuntError: If it cannot be written.
        """
        state = {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_step": self.num_steps_done,
            "step": self.num_steps_done,
            "config": self.config.to_dict(),
        }
        write_whole(path, lambda file: torch.save(state, file))

    def _watch(self, out_dir: Path, on_fault: str, trace_finite: bool) -> nanhunt.Watch:
        options: dict[str, Any] = {"out_dir": out_dir, "on_fault": on_fault, "trace_finite": trace_finite}
        return nanhunt.watch(
            self.model,
            self.optimizer,
            target=self.target_name,
            config=self.target.config,
            start_step=self.num_steps_done,
            **options,
        )

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    def _diverged(self, reason: str) -> DivergedError:
        parameters = list(self.model.parameters())
        bad = sum(1 for parameter in parameters if not bool(torch.isfinite(parameter).all()))
        return DivergedError(
            f"training ended after {self.num_steps_done} steps with {bad} of {len(parameters)} weight tensors "
            f"non-finite ({reason})",
            help="run it again with --trace-finite to catch the step that did it",
        )
