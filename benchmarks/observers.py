"""What it costs to observe a training step: nanhunt's observers and others, as multiples of the untraced step.

A step is forward, loss, backward, AdamW (foreach, its default) and ``zero_grad``. All observers are interleaved in one
run on one thread: each round runs a block of steps under every observer in random order and divides the CPU time of
its steps by that of the untraced blocks before and after it. The table gives the median and the quartiles of these
ratios; the row "untraced again" is the noise. Each observer stands around a whole block; what putting it on and taking
it off costs is left out of the ratio and given in the last column, in milliseconds. ``observer_variants.py`` says how
the observers that work otherwise are used.

    python benchmarks/observers.py [--models tiny conv] [--variants sentinel "exact tracer"] [--rounds 21] [--targets]
    python benchmarks/observers.py --profile sentinel tiny

Observers of packages that are not installed are left out with the reason; for all of them:
``pip install -c constraints.txt transformers accelerate mindstudio-probe``.
"""

import argparse
import cProfile
import gc
import json
import os
import pstats
import tempfile
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from interleaved import interleaved, quartiles
from observer_models import WORKLOADS, Workload
from observer_variants import OBSERVERS, Observer, one_line, quiet, say, why_missing

BASE = next(iter(OBSERVERS))

GOALS: dict[str, dict[str, float]] = {
    "sentinel": {"tiny": 1.05, "": 1.01},
    "module tracer": {"tiny": 1.10, "": 1.02},
    "exact tracer": {"tiny": 2.0, "v3-small": 1.5, "": 1.15},
    "exact, later steps": {"tiny": 2.0, "v3-small": 1.5, "": 1.15},
}
"""By observer and model: the ratio it may cost at most; '' is any other model."""


@dataclass
class Row:
    """One observer on one model; the ratio is None where it did not run."""

    observer: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    on_and_off_ms: float | None = None
    goal: float | None = None
    note: str = ""
    reason: str = ""


@dataclass
class Table:
    """One model."""

    model: str
    num_parameters: int
    step_ms: float
    rounds: int
    steps_per_block: int
    rows: list[Row] = field(default_factory=list)


class Block:
    """A block of steps under one observer."""

    def __init__(self, observer: Observer, work: Workload) -> None:
        self.switching_s: list[float] = []
        self.work = work
        self._observer = observer
        with quiet():
            observer.prepare(work)

    def __call__(self) -> float:
        """CPU seconds of one step."""
        gc.collect()
        # Files of captures or statistics go to a folder of our own; the standard streams are put aside.
        with quiet():
            around = self._observer.around(self.work)
            before = time.process_time()
            with around:
                started = time.process_time()
                for _ in range(self.work.block_steps):
                    self._observer.step(self.work)
                seconds = time.process_time() - started
            self.switching_s.append(time.process_time() - before - seconds)
            self._observer.clean_up()
        return seconds / self.work.block_steps


def prepared(model: str, names: Sequence[str], folder: Path) -> tuple[dict[str, Block], dict[str, Observer], list[Row]]:
    """The blocks that can be run, their observers, and a row for each that cannot."""
    shared = WORKLOADS[model]()
    blocks, observers, missing = {}, {}, []
    for number, name in enumerate(names):
        own_folder = folder / f"{model}-{number}"
        own_folder.mkdir()
        observer = OBSERVERS[name](own_folder)
        reason = why_missing(observer)
        if not reason:
            try:
                block = Block(observer, WORKLOADS[model]() if observer.has_own_model else shared)
                block()
            except Exception as error:  # noqa: BLE001 - another package's failure is a row, not our end
                reason = one_line(error)
        if reason:
            missing.append(Row(name, note=observer.note, reason=reason))
            say(f"{model}: {name} not run: {reason}")
        else:
            blocks[name], observers[name] = block, observer
            block.switching_s.clear()
    return blocks, observers, missing


def measured(model: str, names: Sequence[str], rounds: int, folder: Path) -> Table:
    """The table of one model."""
    blocks, observers, missing = prepared(model, names, folder)
    gc.collect()
    gc.freeze()
    started = time.monotonic()
    base = blocks.pop(BASE)
    of_base, ratios = interleaved(
        base, blocks, rounds, say=lambda n: say(f"{model}: round {n + 1}/{rounds}, {time.monotonic() - started:.0f} s")
    )
    gc.unfreeze()
    step_ms = 1e3 * quartiles(of_base)[1]
    table = Table(model, base.work.num_parameters, step_ms, rounds, base.work.block_steps)
    for name, values in ratios.items():
        low, middle, high = quartiles(values)
        switching = 1e3 * quartiles(blocks[name].switching_s)[1]
        goals = GOALS.get(name, {})
        goal = goals.get(model, goals.get(""))
        table.rows.append(Row(name, middle, low, high, switching, goal, observers[name].note))
    table.rows += missing
    return table


def printed(table: Table, *, with_goals: bool) -> str:
    """The table in 80 columns."""
    shape = f"{table.rounds} rounds of {table.steps_per_block} steps, 1 thread"
    head = f"{'observer':<18}{'ratio':>9}   {'[p25, p75]':<20}{'on+off ms':>10}"
    lines = [
        f"{table.model}: {table.num_parameters / 1e6:.2f} M parameters, {table.step_ms:.1f} ms a step, {shape}",
        head + (f"{'goal':>9}" if with_goals else ""),
    ]
    for row in table.rows:
        if row.ratio is None or row.low is None or row.high is None:
            lines += textwrap.wrap(f"{row.observer:<21}not run: {row.reason}", 80, subsequent_indent=" " * 21)
            continue
        spread = f"[{row.low:.3f}, {row.high:.3f}]"
        line = f"{row.observer:<18}{row.ratio:>9.3f}   {spread:<20}{row.on_and_off_ms:>10.2f}"
        if with_goals and row.goal is not None:
            line += f"{row.goal:>9.2f} {'met' if row.ratio <= row.goal else 'missed'}"
        lines.append(line)
    return "\n".join(lines)


def profile(name: str, model: str, steps: int, folder: Path) -> None:
    """Where the time of observed steps goes: the 25 functions with the most time of their own."""
    observer, work = OBSERVERS[name](folder), WORKLOADS[model]()
    profiler = cProfile.Profile(time.process_time)
    with quiet():
        observer.prepare(work)
        work.step()
        with observer.around(work):
            profiler.enable()
            for _ in range(steps):
                observer.step(work)
            profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(OBSERVERS),
        default=list(OBSERVERS),
        metavar="NAME",
        help=", ".join(OBSERVERS),
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--targets", action="store_true", help="print the goals next to the figures")
    parser.add_argument("--profile", nargs=2, metavar=("OBSERVER", "MODEL"), help="profile this one and stop")
    parser.add_argument("--steps", type=int, default=50, help="steps of a profile")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark and prints a table per model."""
    options = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    with tempfile.TemporaryDirectory(prefix="nanhunt-observers-") as name:
        folder = Path(name)
        if options.profile:
            profile(*options.profile, options.steps, folder)
            return
        names = list(dict.fromkeys([BASE, *options.variants]))
        load = os.getloadavg()[0]
        tables = []
        for model in options.models:
            try:
                tables.append(measured(model, names, options.rounds, folder))
            except Exception as error:  # noqa: BLE001 - one model's failure must not cost the figures of the others
                print(f"{model}: not measured: {one_line(error)}\n", flush=True)
                continue
            print(printed(tables[-1], with_goals=options.targets) + "\n", flush=True)
    notes = {row.observer: row.note for table in tables for row in table.rows if row.note}
    for observer, note in notes.items():
        print(f"{observer}: {note}")
    print(f"torch {torch.__version__}; load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    if options.json:
        figures = {"torch": torch.__version__, "models": [asdict(table) for table in tables]}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
