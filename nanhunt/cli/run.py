"""``nanhunt run``: an unmodified script under the sentinel or the exact tracer."""

from pathlib import Path
from typing import Annotated

import typer

from nanhunt.errors import NanhuntError

# What follows the script is the script's, options included.
SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": False}
_ACTIONS = ("raise", "skip", "record")


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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file as JSON.", show_default=False)
    ] = None,
    fail: Annotated[bool, typer.Option("--fail/--no-fail", help="Exit with 1 where a fault was found.")] = True,
) -> None:
    """Runs a script as python does, and reports the first non-finite step to standard error.

    Exit code: 1 a fault was found, 2 the script or the options cannot be used, else the script's own; 130 Ctrl-C.

    Examples:
      nanhunt run train.py --lr 0.1

      nanhunt run --exact -m mypackage.train --lr 0.1

      torchrun --nproc-per-node 2 -m nanhunt run train.py
    """
    if on_fault not in (None, *_ACTIONS):
        raise NanhuntError(f"--on-fault is raise, skip or record, not {on_fault!r}")
    given = {"--on-fault": on_fault, "--out": out, "--max-captures": max_captures}
    unused = [name for name, value in given.items() if value is not None]
    if exact and unused:
        raise NanhuntError(f"{unused[0]} says what the sentinel does and cannot go with --exact")

    from nanhunt.script.running import Settings, run_script

    settings = Settings(
        is_module=is_module,
        is_exact=exact,
        out_dir=out or Path("debug"),
        on_fault=on_fault or "raise",  # type: ignore[arg-type]
        max_captures=20 if max_captures is None else max_captures,
        json_file=json_file,
        fails_on_fault=fail,
    )
    raise typer.Exit(run_script(script, settings))
