"""The report for a terminal: 80 columns, readable without colour."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanhunt.findings import ChainLink, DataTable, Finding, Location, Report
from nanhunt.numerics import count
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome

SUFFIX = ".txt"
WIDTH = 80

# Tables are padded to their full width; among the blanks stand the codes that begin and end a colour.
_TRAILING = re.compile(r"(?: |\x1b\[[0-9;]*m)+$", re.MULTILINE)

_STYLES = {
    "finite": "green",
    "NON-FINITE": "bold red",
    "not run": "yellow",
    "error": "bold red",
    "warning": "bold yellow",
}


def render(report: Report) -> str:
    """The report as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def print_report(report: Report, console: Console) -> None:
    """Prints the report, in colour where the console has it."""
    with console.capture() as printed:
        _print_sections(report, console)
    console.file.write(_TRAILING.sub(lambda end: end[0].replace(" ", ""), printed.get()))


def _print_sections(report: Report, console: Console) -> None:
    _print_head(report, console)
    for finding in report.findings:
        console.print()
        _print_finding(finding, console)
    if report.chain:
        _section(console, "from there to the weights")
        _print_chain(report.chain, console)
    if report.grid:
        _section(console, "weights against batches")
        _print_grid(report.grid, console)
    if report.experiments:
        _section(console, "the same step with one thing changed")
        _print_experiments(report.experiments, console)
    for table in report.tables:
        _section(console, table.title)
        _print_data(table, console)
    if report.skips:
        _section(console, "not done")
        for skip in report.skips:
            _wrapped(console, f"{skip.what}: {skip.reason}", "  - ")
    _section(console, f"verdict: {report.verdict.certainty}")
    for sentence in report.verdict.sentences:
        _wrapped(console, sentence, "  - ")
    console.print()
    run = f"{count(report.num_steps, 'step')} run" if report.determinism is not None else "done"
    console.print(_text(f"{run} in {report.seconds:.1f} s", "dim"))


def _print_head(report: Report, console: Console) -> None:
    _wrapped(console, _text(report.title, "bold"), "", "  ")
    table = _columns(2)
    for left, right in (*report.facts, *_determinism(report)):
        table.add_row(_text(left, "dim"), _text(right))
    console.print(Padding(table, (0, 0, 0, 2)))
    if not report.findings:
        console.print()
        _wrapped(console, _nothing_found(report), "")


def _determinism(report: Report) -> Iterator[tuple[str, str]]:
    if report.determinism is not None:
        detail = f" ({report.determinism.detail})" if report.determinism.detail else ""
        yield "determinism", f"{report.determinism.status}{detail}"


def _nothing_found(report: Report) -> str:
    """What the absence of a finding means, which is not always that all is well."""
    if report.absence:
        return report.absence
    if report.baseline is not None and not report.baseline.is_finite:
        return "the step is not finite, but no operation was found that began it"
    return "no operation was found to make a non-finite value that does harm"


def _print_finding(finding: Finding, console: Console) -> None:
    head = _text(f"{finding.severity}[{finding.code}]", _STYLES[finding.severity])
    _wrapped(console, head.append_text(_text(f": {finding.message}", "bold")), "", "    ")
    where = finding.location
    named = " of ".join(part for part in (where.op, where.forward_op) if part)
    place = ", ".join(part for part in (named, where.phase, *_numbers(where)) if part)
    line = f"{short_path(where.source.file)}:{where.source.line}" if where.source is not None else ""
    for text in (place, where.tensor or where.module, line):
        if text:
            _wrapped(console, text, "  --> ")
    if where.source is not None and where.source.text:
        _wrapped(console, _text(where.source.text, "cyan"), "   |  ", "   |      ")
    if finding.evidence:
        console.print("   |")
        width = max(len(key) for key in finding.evidence)
        for key, value in finding.evidence.items():
            _wrapped(console, _number(value), f"   |  {key:<{width}} = ", f"   |  {'':<{width}}   ")
    console.print("   |")
    certainty = "" if finding.cause == finding.certainty else f" ({finding.certainty})"
    _wrapped(console, f"{finding.cause}{certainty}", "   = cause: ")
    for note in finding.notes:
        _wrapped(console, note, "   = note: ")
    for text in finding.help:
        _wrapped(console, text, "   = help: ")
    _wrapped(console, f"nanhunt explain {finding.code}", "   = explain: ")


def _numbers(where: Location) -> Iterator[str]:
    """Step, part of the step and process, as far as they say something."""
    if where.step is not None:
        yield f"step {where.step}"
    if where.micro_step:
        yield f"micro-step {where.micro_step}"
    if where.rank:
        yield f"rank {where.rank}"


def _print_chain(chain: Iterable[ChainLink], console: Console) -> None:
    table = _columns(3)
    for number, link in enumerate(chain):
        table.add_row("->" if number else "", _text(link.what), _text(link.detail))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_grid(grid: Iterable[GridCell], console: Console) -> None:
    table = _table("weights", "batch", "forward", "backward", "step")
    for cell in grid:
        weights = cell.weights if cell.seed is None else f"{cell.weights} (seed {cell.seed})"
        table.add_row(weights, cell.batch, *_phases(cell.outcome))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_experiments(experiments: Iterable[ExperimentResult], console: Console) -> None:
    table = _table("step", "grad norm", "zero grads", "changed")
    for result in experiments:
        if result.outcome is None:
            table.add_row(_word("not run"), "", "", _text(f"{result.title} ({result.skipped})"))
            continue
        outcome = result.outcome
        finite = outcome.is_finite
        mask = " (mask)" if finite and result.family == "mask" else ""
        word = _word("finite", mask) if finite else _word("NON-FINITE", f" ({outcome.failed_phase})")
        norm = f"{outcome.gradient_norm:.3g}" if finite else ""
        zero = f"{outcome.num_zero_gradients}/{outcome.gradients.num_tensors}" if finite else ""
        note = f" ({result.note})" if finite and result.note else ""
        table.add_row(word, norm, zero, _text(f"{result.title}{note}"))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_data(data: DataTable, console: Console) -> None:
    table = _table(*data.columns)
    for row in data.rows:
        table.add_row(*(_text(_number(value)) for value in row))
    console.print(Padding(table, (0, 0, 0, 2)))
    if data.note:
        _wrapped(console, data.note, "  ")


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
    """Columns under headings; only the last one may wrap, so that every row is told by its first."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number < len(headings) - 1)
    return table


def _columns(number: int) -> Table:
    """Columns without headings."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(number):
        table.add_column(overflow="fold")
    return table


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _wrapped(console: Console, text: str | Text, lead: str, next_lead: str | None = None) -> None:
    """The text with ``lead`` before its first line and ``next_lead``, by default blanks, before the others."""
    leads = (lead, " " * len(lead) if next_lead is None else next_lead)
    width = max(console.width - max(map(len, leads)), 20)
    whole = _text(text) if isinstance(text, str) else text
    for number, line in enumerate(whole.wrap(console, width, overflow="fold")):
        line.rstrip()
        console.print(Text(leads[min(number, 1)]).append_text(line))


def _text(text: str, style: str = "") -> Text:
    """The text as it is: no markup, and nothing a terminal would obey, for names and paths come from files."""
    shown = text.expandtabs(4)
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown), style=style)


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
    if isinstance(value, list | tuple):
        return f"[{', '.join(_number(item) for item in value)}]"
    return str(value)
