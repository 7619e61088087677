"""What the verbs that give a report have in common: its form, its file, and the exit code.

What is large is imported where it is used: every verb imports this module, and most print no report.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanhunt.errors import NanhuntError, first_line
from nanhunt.files import write_text
from nanhunt.findings import Report, Severity
from nanhunt.reports import REPORTS, format_of

FailOn = Literal["error", "warning", "never"]

SEVERITIES: dict[FailOn, tuple[Severity, ...]] = {"error": ("error",), "warning": ("error", "warning"), "never": ()}
"""What makes the exit code 1."""

AsJson = Annotated[bool, typer.Option("--json", help="The same as --format json.")]


def known_format(name: str | None) -> str | None:
    """The same name; a wrong one is to be known before the work is done, not after it.

    Raises:
        NanhuntError: If there is no such format.
    """
    if name is not None:
        renderer(name)
    return name


def report_file(path: Path | None) -> Path | None:
    """The same path.

    Raises:
        NanhuntError: If it is a folder.
    """
    if path is not None and path.is_dir():
        raise NanhuntError(f"cannot write {path}: it is a folder", help="name a file in it")
    return path


def _with_reasons(words: list[str] | None) -> list[str] | None:
    """The same words; the project's file is read as well, for it may be wrong without this option."""
    from nanhunt.settings import ignored_rules

    ignored_rules(words or ())
    return words


FORMAT_HELP = f"{', '.join(REPORTS)}, or module:function; else as the file ends."
IGNORE_HELP = 'Ignore a rule, or all that begin so: NH402="the reason". May be repeated.'

Format = Annotated[str | None, typer.Option("--format", help=FORMAT_HELP, show_default=False, callback=known_format)]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write the report to this file.", show_default=False, callback=report_file)
]
FailOnOption = Annotated[FailOn, typer.Option("--fail-on", help="The least that makes the exit code 1.")]
GitBisect = Annotated[bool, typer.Option("--git-bisect", help="Exit code 125 in place of 2, for `git bisect run`.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help=IGNORE_HELP, show_default=False, callback=_with_reasons),
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
    from nanhunt.settings import ignored_rules, without_ignored

    report = without_ignored(report, ignored_rules(ignore or ()))
    name = form or ("json" if as_json else format_of(out) if out is not None else "console")
    if out is not None:
        write_text(out, rendered(report, name))
        sys.stderr.write(f"nanhunt: wrote {out}\n")
    elif name == "console":
        _print(report)
    else:
        sys.stdout.write(rendered(report, name))
    return report


def _print(report: Report) -> None:
    from rich.console import Console

    from nanhunt.reports import console

    width = min(Console(highlight=False).width, 100)
    console.print_report(report, Console(highlight=False, width=width))


def rendered(report: Report, name: str) -> str:
    """The report as text that ends with a line break.

    Raises:
        NanhuntError: If there is no such form, or it cannot put this report into words.
    """
    render = renderer(name)
    try:
        text: Any = render(report)
    except Exception as error:
        if name in REPORTS:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NanhuntError(f"report format {name!r} failed: {reason}") from error
    if not isinstance(text, str):
        raise NanhuntError(f"report format {name!r} gave a {type(text).__name__}, not text")
    return text.rstrip("\n") + "\n"


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
    # As for --target: what lies in the working folder is meant too.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = getattr(import_module(module), attribute)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NanhuntError(f"report format {name!r} cannot be loaded: {reason}") from error
    if not callable(found):
        raise NanhuntError(f"report format {name!r} is a {type(found).__name__}, not a function")
    return found


def exit_code(report: Report, fail_on: FailOn) -> int:
    """1 where a finding is at least as severe as ``fail_on``, else 0."""
    return int(any(finding.severity in SEVERITIES[fail_on] for finding in report.findings))
