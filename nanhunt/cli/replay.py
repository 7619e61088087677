"""``nanhunt replay``: run a captured step again and test what made it non-finite."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nanhunt.cli.output import AsJson, FailOnOption, Format, GitBisect, Ignore, Out, deliver, exit_code
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
    seeds: Annotated[int, typer.Option(min=0, help="Fresh initialisations to compare with.")] = 2,
    as_json: AsJson = False,
    form: Format = None,
    out: Out = None,
    fail_on: FailOnOption = "error",
    git_bisect: GitBisect = False,
    ignore: Ignore = None,
) -> None:
    """Runs a captured step again, names the operation that made it non-finite, and tests why.

    Exit code: 0 nothing non-finite was found, 1 a fault was found, 2 the file or the target cannot be used, 130 Ctrl-C
    came before the step had run once.

    Examples:
      nanhunt replay debug/bad_batch_000019.pt

      nanhunt replay debug/bad_batch_000019.pt --target mymodel:target

      nanhunt replay old_batch.pt --checkpoint last.pt --json > report.json
    """
    from rich.console import Console

    from nanhunt.experiments.replay import replay as run_replay

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
    is_unexplained = not report.findings and report.baseline is not None and not report.baseline.is_finite
    if report.baseline is None and not report.findings:
        code = 128 + 2
    else:
        code = 1 if is_unexplained and fail_on != "never" else 0
    report = deliver(report, as_json=as_json, form=form, out=out, ignore=ignore)
    raise typer.Exit(code or exit_code(report, fail_on))
