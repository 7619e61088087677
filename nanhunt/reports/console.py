"""The report for a terminal: 80 columns, readable without colour."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanhunt.findings import Finding, Report
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome

SUFFIX = ".txt"
WIDTH = 80

_STYLES = {"finite": "green", "NON-FINITE": "bold red", "not run": "yellow"}


def render(report: Report) -> str:
    """The report as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Prints the report, in colour where the console has it."""
    _print_head(report, console)
    for finding in report.findings:
        _print_finding(finding, console)
    if report.chain:
        _section(console, "from there to the weights")
        _pairs(console, ((link.what, link.detail) for link in report.chain), arrow=True)
    if report.grid:
        _section(console, "weights against batches")
        _print_grid(report.grid, console)
    if report.experiments:
        _section(console, "the same step with one thing changed")
        _print_experiments(report.experiments, console)
    if report.skips:
        _section(console, "not done")
        for skip in report.skips:
            _wrapped(console, f"{skip.what}: {skip.reason}", "- ")
    _section(console, f"verdict: {report.verdict.certainty}")
    for sentence in report.verdict.text.split(". "):
        _wrapped(console, sentence, "  ")
    console.print()
    console.print(f"{report.num_steps} steps run in {report.seconds:.1f} s", style="dim", highlight=False)


def _print_head(report: Report, console: Console) -> None:
    console.print(Text(report.title, style="bold"))
    _pairs(console, report.facts)
    detail = f" ({report.determinism.detail})" if report.determinism.detail else ""
    _pairs(console, [("determinism", f"{report.determinism.status}{detail}")])
    console.print()
    if not report.findings:
        console.print(Text("no operation was found to make a non-finite value that does harm"))


def _print_finding(finding: Finding, console: Console) -> None:
    head = Text(f"{finding.severity}[{finding.code}]", style="bold red")
    head.append(f": {finding.message}", style="bold")
    console.print(head, highlight=False)
    where = finding.location
    named = " of ".join(part for part in (where.op, where.forward_op) if part)
    place = [named, where.phase, f"step {where.step}" if where.step is not None else ""]
    console.print(f"  --> {', '.join(part for part in place if part)}", highlight=False)
    if where.module:
        console.print(f"  --> {where.module}", highlight=False)
    if where.source is not None:
        console.print(f"  --> {short_path(where.source.file)}:{where.source.line}", highlight=False)
        console.print(Text(f"   |  {where.source.text}", style="cyan"))
    if finding.evidence:
        console.print("   |")
        width = max(len(key) for key in finding.evidence)
        for key, value in finding.evidence.items():
            console.print(Text(f"   |  {key:<{width}} = {_number(value)}"))
    console.print("   |")
    _wrapped(console, f"{finding.cause} ({finding.certainty})", "   = cause: ")
    for note in finding.notes:
        _wrapped(console, note, "   = note: ")
    for text in finding.help:
        _wrapped(console, text, "   = help: ")


def _print_grid(grid: Iterable[GridCell], console: Console) -> None:
    table = _table("weights", "batch", "forward", "backward", "step")
    for cell in grid:
        weights = cell.weights if cell.seed is None else f"{cell.weights} (seed {cell.seed})"
        table.add_row(weights, cell.batch, *_phases(cell.outcome))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_experiments(experiments: Iterable[ExperimentResult], console: Console) -> None:
    table = _table("changed", "step", "zero grads")
    for result in experiments:
        if result.outcome is None:
            table.add_row(Text(f"{result.title}: {result.skipped}"), _word("not run"), "")
            continue
        outcome = result.outcome
        finite = outcome.is_finite
        mask = " (mask)" if finite and result.family == "mask" else ""
        word = _word("finite", mask) if finite else _word("NON-FINITE", f" ({outcome.failed_phase})")
        zero = f"{outcome.num_zero_gradients} of {outcome.gradients.num_tensors}" if finite else ""
        table.add_row(Text(result.title), word, zero)
    console.print(Padding(table, (0, 0, 0, 2)))


def _phases(outcome: StepOutcome) -> tuple[Text, Text, Text]:
    order = ("forward", "backward", "step")
    if outcome.failed_phase is None:
        return _word("finite"), _word("finite"), _word("finite")
    failed = order.index(outcome.failed_phase)
    words = [_word("finite") if n < failed else _word("NON-FINITE") for n in range(3)]
    return words[0], words[1], words[2]


def _word(word: str, suffix: str = "") -> Text:
    return Text(f"{word}{suffix}", style=_STYLES[word])


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number > 0)
    return table


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _pairs(console: Console, pairs: Iterable[tuple[str, str]], *, arrow: bool = False) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=False)
    table.add_column(overflow="fold")
    for number, (left, right) in enumerate(pairs):
        lead = ("-> " if number else "   ") if arrow else ""
        table.add_row(Text(f"{lead}{left}", style="" if arrow else "dim"), Text(right))
    console.print(Padding(table, (0, 0, 0, 2)))


def _wrapped(console: Console, text: str, lead: str) -> None:
    """The text with ``lead`` before its first line and the same width of blanks before the others."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 0, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(lead), Text(text))
    console.print(table)


def short_path(file: str) -> str:
    """The file as seen from the working folder, where it lies below it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
