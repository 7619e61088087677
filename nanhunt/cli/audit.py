"""``nanhunt audit`` and its parts: what is wrong with a set-up before, or after, a step goes wrong."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanhunt.cli.output import AsJson, FailOnOption, Format, GitBisect, Ignore, Out, deliver, exit_code
from nanhunt.errors import NanhuntError, first_line

if TYPE_CHECKING:
    from nanhunt.audit.subject import Subject
    from nanhunt.findings import Report

AUDITS = ("optimizer", "dtype", "init", "data")
"""In the order in which ``nanhunt audit`` runs them; each is a module of ``nanhunt.audit``."""

_EXAMPLES = {
    "audit": ("", "debug/bad_batch_000019.pt", "--target mymodel:target --out audit.html"),
    "audit-optimizer": ("--target detector.incident", "last.pt", "last.pt --target mymodel:target --config run.yaml"),
    "audit-dtype": ("--target detector.incident", "debug/bad_batch_000019.pt --json"),
    "audit-init": ("--target mymodel:target", "--target mymodel:target --fail-on error"),
    "audit-data": ("debug/bad_batch_000019.pt", "--target mymodel:target"),
}

_PURPOSES = {
    "audit": "Runs all audits: optimizer, dtype, init and data.",
    "audit-optimizer": "Looks at parameter groups, optimizer state, schedule and clipping.",
    "audit-dtype": "Runs one step and reports where types change, and what that costs against float64.",
    "audit-init": "Measures the scale of values and gradients, layer by layer, on fresh weights.",
    "audit-data": "Looks for flat, clipped, duplicated, non-finite and out-of-scale inputs, and for labels.",
}

_CODES = "Exit code: 0 nothing at or above --fail-on was found, 1 something was, 2 the file or target cannot be used."


def verb(name: str) -> Callable[..., None]:
    """The command of this name, such as ``audit-dtype``; plain ``audit`` runs all of them."""
    parts = AUDITS if name == "audit" else (name.removeprefix("audit-"),)

    def command(
        file: Annotated[Path | None, typer.Argument(help="A capture or a checkpoint.", show_default=False)] = None,
        target: Annotated[
            str | None,
            typer.Option(help="module:attribute or an installed name; else the captured one.", show_default=False),
        ] = None,
        config: Annotated[
            Path | None,
            typer.Option(help="Configuration of the target: .json, .toml or .yaml.", show_default=False),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of fresh weights and of a batch the target makes.")] = 0,
        as_json: AsJson = False,
        form: Format = None,
        out: Out = None,
        fail_on: FailOnOption = "warning",
        git_bisect: GitBisect = False,
        ignore: Ignore = None,
    ) -> None:
        from nanhunt.audit.subject import find_subject

        sys.path.insert(0, str(Path.cwd()))
        report = _report(parts, find_subject(file, target, config, seed))
        report = deliver(report, as_json=as_json, form=form, out=out, ignore=ignore)
        raise typer.Exit(exit_code(report, fail_on))

    examples = "\n\n".join(f"  nanhunt {name} {words}".rstrip() for words in _EXAMPLES[name])
    command.__doc__ = f"{_PURPOSES[name]}\n\n{_CODES}\n\nExamples:\n{examples}\n"
    return command


def _report(names: tuple[str, ...], subject: "Subject") -> "Report":
    """The report of one audit, or all of them as one; what one of several cannot do is a skip."""
    from rich.console import Console

    from nanhunt.audit.report import joined, skipped

    reports, problems = [], []
    with Console(stderr=True, highlight=False).status("") as status:
        for name in names:
            status.update(f"auditing: {name}")
            module = import_module(f"nanhunt.audit.{name}")
            try:
                reports.append(module.audit_subject(subject, lambda what, name=name: status.update(f"{name}: {what}")))
            except Exception as error:  # noqa: BLE001 - models, losses and data of others may fail in any way
                problems.append(error)
                reports.append(skipped(f"audit-{name}", error))
    if len(problems) == len(names):
        raise _one_line(problems[0]) from problems[0]
    return reports[0] if len(reports) == 1 else joined(f"audit of {subject.name}", reports)


def _one_line(error: Exception) -> NanhuntError:
    if isinstance(error, NanhuntError):
        return error
    return NanhuntError(f"the audit cannot be done: {type(error).__name__}: {first_line(error)}")
