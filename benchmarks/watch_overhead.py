"""What ``nanhunt.watch`` costs: a watched V3 step against an unwatched one, interleaved in one run.

Each round runs both steps in random order on one thread and takes the ratio of their process CPU times to those of the
unwatched steps around them; the table gives the median and quartiles of the ratios. The row "twice unwatched" is the
noise of the method. The last row is the time spent inside the sentinel's own hooks as a share of the step, which is
free of that noise.

    python benchmarks/watch_overhead.py [--rounds 15] [--preset v3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from interleaved import cpu_seconds, interleaved, quartiles

import nanhunt
from detector.config import PRESETS
from detector.target import DetectorTarget
from detector.windows import synthetic_batches


class TimedWatch(nanhunt.Watch):
    """The sentinel with a clock around each of its hooks."""

    seconds = 0.0

    def _timed(self, hook: Callable, *args: object) -> object:
        started = time.process_time()
        try:
            return hook(*args)
        finally:
            self.seconds += time.process_time() - started

    def _before_forward(self, *args: object) -> object:
        return self._timed(super()._before_forward, *args)

    def _after_forward(self, *args: object) -> object:
        return self._timed(super()._after_forward, *args)

    def _before_step(self, *args: object) -> object:
        return self._timed(super()._before_step, *args)

    def _after_step(self, *args: object) -> object:
        return self._timed(super()._after_step, *args)


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--preset", default="v3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS[options.preset]
    config = replace(config, train=replace(config.train, batch_size=1))
    target = DetectorTarget(config)
    model = target.build(0)
    optimizer = target.optimizer(model)
    batch = next(synthetic_batches(config.train))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        target.loss(model, batch).backward()
        optimizer.step()

    def watched() -> None:
        with nanhunt.watch(model, optimizer, out_dir=tempfile.gettempdir()) as hunt:
            for _ in hunt.batches([batch]):
                step()

    for _ in range(2):
        step()
    runs = {"twice unwatched": partial(cpu_seconds, step), "watched": partial(cpu_seconds, watched)}
    steps, ratios = interleaved(partial(cpu_seconds, step), runs, options.rounds)
    hunt = TimedWatch(model, optimizer, out_dir=tempfile.gettempdir())
    with hunt:
        inside = []
        for _ in hunt.batches([batch] * 5):
            before = hunt.seconds
            step()
            inside.append(hunt.seconds - before)
    base = statistics.median(steps)
    number = len(list(model.parameters()))
    print(f"{options.preset}, batch 1, {number} parameter tensors, 1 thread, {options.rounds} rounds")
    print(f"unwatched step                 {base:.3f} s CPU")
    for name, values in ratios.items():
        low, middle, high = quartiles(values)
        print(f"{name:<30} x{middle:.4f}  [{low:.4f}, {high:.4f}]")
    cost = statistics.median(inside)
    print(f"inside the sentinel's hooks    {cost * 1e3:.2f} ms, {cost / base:.3%} of the step")


if __name__ == "__main__":
    main()
