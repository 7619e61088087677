"""``nanhunt run``: an unmodified script under the sentinel or the exact tracer."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nanhunt.cli.output import (
    FORMAT_HELP,
    IGNORE_HELP,
    SEVERITIES,
    FailOnOption,
    known_format,
    rendered,
    report_file,
)
from nanhunt.errors import NanhuntError
from nanhunt.findings import Report
from nanhunt.reports import format_of

# What follows the script is the script's, options included.
SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": False}
_ACTIONS = ("raise", "skip", "record")
_CANNOT_BE_TESTED = 125


def run(
    script: Annotated[
        list[str],
        typer.Argument(help="The script and its own arguments.", metavar="SCRIPT [ARGS]...", show_default=False),
    ],
    is_module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as for python -m.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Trace every operation, to name the first offender and its line; slow.")
    ] = False,
    on_fault: Annotated[
        str | None,
        typer.Option(help="At a non-finite step: raise (default), skip or record.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the captures; by default debug.", show_default=False)
    ] = None,
    max_captures: Annotated[
        int | None, typer.Option(min=0, help="Captures written at most; by default 20.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file too, as it ends or --format says.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file as JSON.", show_default=False)
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help=FORMAT_HELP, show_default=False)] = None,
    fail: Annotated[bool, typer.Option("--fail/--no-fail", help="--no-fail is --fail-on never.")] = True,
    fail_on: FailOnOption = "error",
    git_bisect: Annotated[
        bool, typer.Option("--git-bisect", help="Exit code 125 also where the script itself fails or did not train.")
    ] = False,
    ignore: Annotated[list[str] | None, typer.Option(help=IGNORE_HELP, show_default=False)] = None,
) -> None:
    """Runs a script as python does, and reports the first non-finite step to standard error.

    Exit code: 1 a fault was found, 2 the script or the options cannot be used, else the script's own; 130 Ctrl-C. With
    --git-bisect a script that fails by itself, or does not train, gives 125: it cannot be tested.

    Examples:
      nanhunt run train.py --lr 0.1

      nanhunt run --exact -m mypackage.train --lr 0.1

      nanhunt run --exact --fail-on warning --ignore NH304="the schedule ends at 0" train.py

      torchrun --nproc-per-node 2 -m nanhunt run train.py
    """
    given = {"--on-fault": on_fault, "--out": out, "--max-captures": max_captures}
    try:
        _check(exact, given)
        known_format(form)
        files = _files(report_file(report), report_file(json_file), form)

        from nanhunt.script.running import Settings, run_script
        from nanhunt.settings import ignored_rules

        settings = Settings(
            is_module=is_module,
            is_exact=exact,
            out_dir=out or Path("debug"),
            on_fault=on_fault or "raise",  # type: ignore[arg-type]
            max_captures=20 if max_captures is None else max_captures,
            files=files,
            render=_render(form) if form is not None and report is None else None,
            ignored=ignored_rules(ignore or ()),
            fail_on=SEVERITIES[fail_on if fail else "never"],
            is_bisecting=git_bisect,
        )
        code = run_script(script, settings)
    except NanhuntError as error:
        if git_bisect:
            error.exit_code = _CANNOT_BE_TESTED
        raise
    raise typer.Exit(code)


def _check(exact: bool, given: Mapping[str, object]) -> None:
    """Refuses what does not go together.

    Raises:
        NanhuntError: If something does not.
    """
    on_fault = given["--on-fault"]
    if on_fault not in (None, *_ACTIONS):
        raise NanhuntError(f"--on-fault is raise, skip or record, not {on_fault!r}")
    unused = [name for name, value in given.items() if value is not None]
    if exact and unused:
        raise NanhuntError(f"{unused[0]} says what the sentinel does and cannot go with --exact")


def _files(report: Path | None, json_file: Path | None, form: str | None) -> dict[Path, Callable[[Report], str]]:
    """Where the report goes, and in which form."""
    files = {json_file: _render("json")} if json_file is not None else {}
    if report is not None:
        files[report] = _render(form or format_of(report))
    return files


def _render(form: str) -> Callable[[Report], str]:
    return partial(rendered, name=form)
