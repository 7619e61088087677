"""The report for a terminal: 80 columns, readable without colour."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanhunt.findings import ChainLink, DataTable, Finding, Report
from nanhunt.numerics import count
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome
from nanhunt.reports.words import cause_of, is_numeric, line_of, nothing_found, place, printable, shown, summary

WIDTH = 80

_MAX_ROWS = 60
# Below this, a column of words is rather a heap of letters.
_MIN_WORDS = 12

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
    _wrapped(console, _text(summary(report), "dim"), "")


def _print_head(report: Report, console: Console) -> None:
    _wrapped(console, _text(report.title, "bold"), "", "  ")
    table = _columns(2)
    for left, right in (*report.facts, *_determinism(report)):
        table.add_row(_text(left, "dim"), _text(right))
    console.print(Padding(table, (0, 0, 0, 2)))
    if not report.findings:
        console.print()
        _wrapped(console, nothing_found(report), "")


def _determinism(report: Report) -> Iterator[tuple[str, str]]:
    if report.determinism is not None:
        detail = f" ({report.determinism.detail})" if report.determinism.detail else ""
        yield "determinism", f"{report.determinism.status}{detail}"


def _print_finding(finding: Finding, console: Console) -> None:
    head = _text(f"{finding.severity}[{finding.code}]", _STYLES[finding.severity])
    _wrapped(console, head.append_text(_text(f": {finding.message}", "bold")), "", "    ")
    where = finding.location
    for text in (place(where), where.tensor or where.module, line_of(where)):
        if text:
            _wrapped(console, text, "  --> ")
    if where.source is not None and where.source.text:
        _wrapped(console, _text(where.source.text, "cyan"), "   |  ", "   |      ")
    if finding.evidence:
        console.print("   |")
        width = max(len(key) for key in finding.evidence)
        for key, value in finding.evidence.items():
            _wrapped(console, shown(value), f"   |  {key:<{width}} = ", f"   |  {'':<{width}}   ")
    console.print("   |")
    _wrapped(console, cause_of(finding), "   = cause: ")
    for note in finding.notes:
        _wrapped(console, note, "   = note: ")
    for text in finding.help:
        _wrapped(console, text, "   = help: ")
    _wrapped(console, f"nanhunt explain {finding.code}", "   = explain: ")


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
    rows = [[shown(value, 6) for value in row] for row in data.rows[:_MAX_ROWS]]
    is_number = [is_numeric(row[column] for row in data.rows) for column in range(len(data.columns))]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    widths = _column_widths([list(data.columns), *rows], is_number, console.width - 2)
    for heading, numeric, width in zip(data.columns, is_number, widths or [], strict=False):
        table.add_column(_text(heading), overflow="fold", justify="right" if numeric else "left", width=width)
    if not rows:
        _wrapped(console, "none", "  ")
    elif widths is None:
        _print_stacked(data.columns, rows, console)
    else:
        for row in rows:
            table.add_row(*(_text(value) for value in row))
        console.print(Padding(table, (0, 0, 0, 2)))
    rest = len(data.rows) - len(rows)
    if rest:
        _wrapped(console, f"and {count(rest, 'row')} more, in the report as JSON (--format json)", "  ")
    if data.note:
        _wrapped(console, data.note, "  ")


def _print_stacked(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Rows one under the other, for tables with too many columns to stand side by side."""
    for row in rows:
        _wrapped(console, row[0], "  ", "      ")
        parts = (f"{heading} {value}" for heading, value in zip(columns[1:], row[1:], strict=True) if value)
        _wrapped(console, ", ".join(parts), "      ")


def _column_widths(rows: Sequence[Sequence[str]], is_number: Sequence[bool], width: int) -> list[int] | None:
    """How wide each column is so that all fit; numbers are never broken. None where that cannot be."""
    natural = [max((cell_len(printable(text)) for text in column), default=0) for column in zip(*rows, strict=True)]
    room = width - 2 * (len(natural) - 1)
    words = [position for position, numeric in enumerate(is_number) if not numeric]
    room -= sum(size for size, numeric in zip(natural, is_number, strict=True) if numeric)
    while (excess := sum(natural[position] for position in words) - room) > 0:
        widest = max(words, key=lambda position: natural[position], default=None)
        if widest is None or natural[widest] <= _MIN_WORDS:
            return None
        second = max((natural[position] for position in words if natural[position] < natural[widest]), default=0)
        natural[widest] = max(natural[widest] - excess, min(second, natural[widest] - 1), _MIN_WORDS)
    return natural


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
    """The text as it is, without markup."""
    return Text(printable(text), style=style)
