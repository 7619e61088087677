"""What the verbs that give a report have in common: its form, its file, and the exit code."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from nanhunt.errors import NanhuntError, first_line
from nanhunt.files import write_text
from nanhunt.findings import Report
from nanhunt.reports import REPORTS, console, format_of
from nanhunt.settings import ignored_rules

FailOn = Literal["error", "warning", "never"]

AsJson = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"{', '.join(REPORTS)}, or module:function; else as --out ends.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Write the report to this file.", show_default=False)]
FailOnOption = Annotated[FailOn, typer.Option("--fail-on", help="The least that makes the exit code 1.")]
GitBisect = Annotated[bool, typer.Option("--git-bisect", help="Exit code 125 in place of 2, for `git bisect run`.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help='Ignore a rule: NH402="the reason". May be repeated.', show_default=False),
]


def deliver(
    report: Report,
    *,
    as_json: bool = False,
    form: str | None = None,
    out: Path | None = None,
    ignore: list[str] | None = None,
) -> Report:
    """Prints or writes the report in the form that was asked for.

    Returns:
        The report without what is to be ignored.

    Raises:
        NanhuntError: If the form is not known or the file cannot be written.
    """
    report = report.ignoring(ignored_rules(ignore or ()))
    name = form or ("json" if as_json else format_of(out) if out is not None else "console")
    render = renderer(name)
    if out is not None:
        write_text(out, render(report))
        sys.stderr.write(f"nanhunt: wrote {out}\n")
    elif name == "console":
        width = min(Console(highlight=False).width, 100)
        console.print_report(report, Console(highlight=False, width=width))
    else:
        sys.stdout.write(render(report).rstrip("\n") + "\n")
    return report


def renderer(name: str) -> Callable[[Report], str]:
    """What turns a report into text, by the name of a format or as ``module:function``.

    Raises:
        NanhuntError: If there is none.
    """
    if name in REPORTS:
        return REPORTS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise NanhuntError(f"no report format {name!r}", help=f"give one of {', '.join(REPORTS)}, or module:function")
    try:
        found: Any = getattr(import_module(module), attribute)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NanhuntError(f"report format {name!r} cannot be loaded: {reason}") from error
    return found


def exit_code(report: Report, fail_on: FailOn) -> int:
    """1 where a finding is at least as severe as ``fail_on``, else 0."""
    counted = {"error": ("error",), "warning": ("error", "warning"), "never": ()}[fail_on]
    return int(any(finding.severity in counted for finding in report.findings))
