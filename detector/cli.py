"""``nanhunt train``: trains the detector, and fails honestly."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detector.config import PRESETS, DetectorConfig
from nanhunt.errors import NanhuntError, NonFiniteStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detector.train import StepStats, Trainer
    from detector.windows import Batch


def train(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "v3",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    trace_finite: Annotated[
        bool, typer.Option("--trace-finite", help="Watch every step and follow every module.")
    ] = False,
    data: Annotated[
        list[Path] | None, typer.Option(help="An EDF recording; may be given several times.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per step.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for captures of failing steps.")] = Path("debug"),
    on_fault: Annotated[str, typer.Option(help="raise, skip or record.")] = "raise",
    save: Annotated[Path | None, typer.Option(help="Write a checkpoint here at the end.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)] = None,
) -> None:
    """Trains the V3 seizure detector on synthetic EEG, or on EDF recordings.

    Without --data it makes its own input: synthetic EEG with rhythms, seizures,
    artefacts and electrode drop-outs, the same for the same seed. The presets
    incident and small-incident are the failing system; they run unwatched
    unless --trace-finite is given.

    Exit code: 0 done, 1 a step went non-finite, 2 wrong use or an unreadable recording.

    Examples:
      nanhunt train --preset small --steps 300

      nanhunt train --preset small-incident --steps 300 --trace-finite

      nanhunt train --preset small --steps 20 --data night1.edf --data night2.edf
    """
    config = _config(preset, seed, batch_size)
    if on_fault not in ("raise", "skip", "record"):
        raise NanhuntError(f"--on-fault is raise, skip or record, not {on_fault!r}")
    import torch

    from detector.train import Trainer
    from nanhunt.memory import keep_freed_memory

    if threads is not None:
        torch.set_num_threads(threads)
    batches = _batches(config, data)
    keep_freed_memory()
    trainer = Trainer(config, target_name=f"detector.{preset}")
    try:
        _run(trainer, batches, steps, out=out, on_fault=on_fault, trace_finite=trace_finite)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted after {trainer.num_steps_done} steps\n")
        _save(trainer, save)
        raise typer.Exit(130) from None
    _save(trainer, save)


def _config(preset: str, seed: int | None, batch_size: int | None) -> DetectorConfig:
    if preset not in PRESETS:
        raise NanhuntError(f"no preset {preset!r}", help=f"one of: {', '.join(PRESETS)}")
    config = PRESETS[preset]
    changed = {name: value for name, value in (("seed", seed), ("batch_size", batch_size)) if value is not None}
    return replace(config, train=replace(config.train, **changed))  # type: ignore[arg-type]


def _batches(config: DetectorConfig, data: "Sequence[Path] | None") -> "Iterator[Batch]":
    from detector.edf import read_edf
    from detector.windows import recording_batches, synthetic_batches

    if not data:
        return synthetic_batches(config.train)
    recordings = [read_edf(path) for path in data]
    for recording in recordings:
        seconds = recording.samples_CT.shape[1] / recording.fs_hz
        sys.stderr.write(f"{recording.name}: {len(recording.samples_CT)} channels, {seconds:.0f} s\n")
        for note in recording.notes:
            sys.stderr.write(f"  {note}\n")
    return recording_batches(recordings, config.train)


def _run(
    trainer: "Trainer", batches: "Iterator[Batch]", steps: int, *, out: Path, on_fault: str, trace_finite: bool
) -> None:
    """Runs the loop behind a progress bar; a fault's module and capture are printed before the error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("step"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.description}"))
    last: list[StepStats] = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting", total=steps)

        def show(stats: "StepStats") -> None:
            last[:] = [stats]
            progress.update(task, completed=stats.step + 1, description=_described(stats))

        try:
            trainer.run(
                batches, num_steps=steps, on_step=show, out_dir=out, on_fault=on_fault, trace_finite=trace_finite
            )
        except NonFiniteStep as fault:
            if fault.module_message:
                console.print(fault.module_message, markup=False)
            raise
    if last:
        sys.stdout.write(f"{last[0].step + 1} steps, {_described(last[0])}\n")


def _described(stats: "StepStats") -> str:
    return (
        f"loss {stats.loss:.4f}  grad {stats.gradient_norm:.3g}  lr {stats.learning_rate:.2g}  "
        f"{stats.windows_per_second:.1f} windows/s"
    )


def _save(trainer: "Trainer", path: Path | None) -> None:
    if path is not None:
        trainer.save(path)
        sys.stderr.write(f"saved {path}\n")
