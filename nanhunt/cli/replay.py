"""``nanhunt replay``: run a captured step again and test what made it non-finite."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nanhunt.findings import Report
from nanhunt.memory import keep_freed_memory


def replay(
    file: Annotated[Path, typer.Argument(help="The capture, as nanhunt.watch wrote it.", show_default=False)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Use the weights of this checkpoint, not the captured ones.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="module:attribute or an installed name; by default the captured one.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    seeds: Annotated[int, typer.Option(min=0, help="Fresh initialisations to compare with.")] = 2,
) -> None:
    """Runs a captured step again, names the operation that made it non-finite, and tests why.

    Exit code: 0 nothing non-finite was found, 1 a fault was found, 2 the file or the target cannot be used, 130 Ctrl-C
    came before the step had run once.

    Examples:
      nanhunt replay debug/bad_batch_000019.pt

      nanhunt replay debug/bad_batch_000019.pt --target mymodel:target

      nanhunt replay old_batch.pt --checkpoint last.pt --json > report.json
    """
    from nanhunt.experiments.replay import replay as run_replay
    from nanhunt.reports import console as console_report
    from nanhunt.reports import json_report

    keep_freed_memory()

    sys.path.insert(0, str(Path.cwd()))
    progress = Console(stderr=True, highlight=False)
    with progress.status("reading the capture") as status:
        report = run_replay(
            file,
            target=target,
            checkpoint=checkpoint,
            num_seeds=seeds,
            progress=lambda what: status.update(f"replaying: {what}"),
        )
    if as_json:
        sys.stdout.write(json_report.render(report) + "\n")
    else:
        out = Console(highlight=False)
        console_report.print_report(report, Console(highlight=False, width=min(out.width, 100)))
    raise typer.Exit(_exit_code(report))


def _exit_code(report: Report) -> int:
    """1 for a fault, also one that no operation was found for; as a shell has it where Ctrl-C came before the step."""
    if report.findings:
        return 1
    if report.baseline is None:
        return 128 + 2
    return 0 if report.baseline.is_finite else 1
