"""The heat maps of magnitudes as data for a plot: rows of modules, columns of steps, the fault marked."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanhunt.findings import Finding, Magnitudes
from nanhunt.numerics import count
from nanhunt.reports.words import printable

MAX_ROWS, MAX_COLUMNS = 160, 200

Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class _Group:
    """Neighbours that are drawn as one."""

    start: int
    stop: int


def heat_maps(magnitudes: Magnitudes, findings: Iterable[Finding]) -> dict[str, Any]:
    """What the page draws: names, steps, log10 of the values, non-finite cells and marks.

    Neighbours are drawn as one where there are more modules or steps than can be told apart on a screen: each shows the
    largest of its values, non-finite ones first. ``notes`` says so.
    """
    findings = [finding for finding in findings if finding.location.step is not None]
    known = set(magnitudes.steps)
    steps = sorted(known | {finding.location.step for finding in findings if finding.location.step is not None})
    wanted = [_row(magnitudes.modules, finding) for finding in findings]
    rows = _groups(len(magnitudes.modules), MAX_ROWS)
    columns = _groups(len(steps), MAX_COLUMNS)
    positions = {step: position for position, step in enumerate(magnitudes.steps)}
    places = [positions.get(step) for step in steps]
    plots = [
        _plot("activations", "of the outputs", magnitudes.activations, rows, columns, places),
        _plot("gradients", "of the loss, by the outputs", magnitudes.gradients, rows, columns, places),
    ]
    return {
        "rows": [_row_name(magnitudes.modules, group) for group in rows],
        "labels": [_label(magnitudes.modules, group) for group in rows],
        "columns": [_column_name(steps, group) for group in columns],
        "plots": [plot | {"summary": _summary(plot, rows, columns, magnitudes, steps)} for plot in plots],
        "marks": [
            {"row": _group_of(rows, row), "column": _group_of(columns, steps.index(step)), "code": finding.code}
            for finding, row in zip(findings, wanted, strict=True)
            if (step := finding.location.step) is not None
        ],
        "notes": _notes(magnitudes, rows, columns, steps, known),
    }


def _row(modules: Sequence[str], finding: Finding) -> int | None:
    """The row of the finding's module, or of the nearest one around it that was followed."""
    where = finding.location
    name = where.module or where.tensor.rpartition(".")[0]
    if not (name or where.op):
        return None
    while name not in modules and name:
        name = name.rpartition(".")[0]
    return modules.index(name) if name in modules else None


def _groups(num: int, most: int) -> list[_Group]:
    """Neighbours together, all groups alike, so that at most ``most`` remain."""
    size = max(1, math.ceil(num / most))
    return [_Group(start, min(start + size, num)) for start in range(0, num, size)]


def _group_of(groups: Sequence[_Group], position: int | None) -> int | None:
    if position is None:
        return None
    return next(place for place, group in enumerate(groups) if group.start <= position < group.stop)


def _plot(
    name: str, of: str, values: Values, rows: list[_Group], columns: list[_Group], places: Sequence[int | None]
) -> dict[str, Any]:
    """One heat map: log10 of the largest value of each cell, its non-finite cells as words, and its zeros."""
    logs: list[list[float | None]] = []
    words: list[tuple[int, int, str]] = []
    zeros: list[tuple[int, int]] = []
    sampled = [[place for place in places[group.start : group.stop] if place is not None] for group in columns]
    for row, group in enumerate(rows):
        merged = values[group.start : group.stop]
        logs.append([])
        for column, inside in enumerate(sampled):
            cell = _largest(line[place] for line in merged for place in inside)
            is_regular = cell is not None and math.isfinite(cell) and cell > 0
            logs[-1].append(round(math.log10(cell), 3) if cell is not None and is_regular else None)
            if cell == 0:
                zeros.append((row, column))
            elif cell is not None and not is_regular:
                words.append((row, column, "NaN" if math.isnan(cell) else "inf"))
    return {"name": name, "of": of, "logs": logs, "range": _span(logs), "nonfinite": words, "zeros": zeros}


def _span(logs: list[list[float | None]]) -> tuple[float, float]:
    """What the colours span: nearly all values, lest one row that stands out make all the others alike."""
    known = sorted(value for line in logs for value in line if value is not None)
    if not known:
        return (-0.5, 0.5)
    rest = len(known) // 50
    low, high = known[rest], known[-1 - rest]
    if known[-1] - known[0] < 1.5 * (high - low) + 1:
        low, high = known[0], known[-1]
    return (low, high) if high - low >= 1 else ((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest; NaN before infinity before any number."""
    known = [value for value in values if value is not None]
    return next((value for value in known if math.isnan(value)), max(known, default=None))


def _summary(
    plot: dict[str, Any], rows: list[_Group], columns: list[_Group], magnitudes: Magnitudes, steps: Sequence[int]
) -> str:
    """The picture in a sentence, for who cannot see it."""
    cells = [
        (value, row, column)
        for row, line in enumerate(plot["logs"])
        for column, value in enumerate(line)
        if value is not None
    ]
    parts = []
    if cells:
        value, row, column = max(cells)
        where = f"{_row_name(magnitudes.modules, rows[row])} at step {_column_name(steps, columns[column])}"
        parts.append(f"largest finite value about {_power(value)}, in {where}")
    low, high = plot["range"]
    beyond = sum(not low <= value <= high for value, _, _ in cells)
    if beyond:
        parts.append(f"the colours span {_power(low)} to {_power(high)}, {count(beyond, 'cell')} beyond")
    if plot["nonfinite"]:
        row, column, word = min(plot["nonfinite"], key=lambda cell: (cell[1], cell[0]))
        where = f"{_row_name(magnitudes.modules, rows[row])} at step {_column_name(steps, columns[column])}"
        parts.append(f"{count(len(plot['nonfinite']), 'non-finite cell')}, first {word} in {where}")
    if plot["zeros"]:
        parts.append(f"{count(len(plot['zeros']), 'cell')} exactly 0")
    return "; ".join(parts) or "nothing was sampled"


def _power(log: float) -> str:
    """The number with this logarithm, which itself may lie just beyond the range of floats."""
    exponent = math.floor(log)
    return f"{10 ** (log - exponent):.1f}e{exponent:+03d}"


def _label(modules: Sequence[str], group: _Group) -> str:
    num = group.stop - group.start
    return printable((modules[group.start] or "(the model)") + (f" +{num - 1}" if num > 1 else ""))


def _row_name(modules: Sequence[str], group: _Group) -> str:
    first, last = modules[group.start] or "(the model)", modules[group.stop - 1] or "(the model)"
    num = group.stop - group.start
    return printable(first if num == 1 else f"{first} to {last} ({num:,} modules)")


def _column_name(steps: Sequence[int], group: _Group) -> str:
    first, last = steps[group.start], steps[group.stop - 1]
    return str(first) if first == last else f"{first} to {last}"


def _notes(
    magnitudes: Magnitudes, rows: list[_Group], columns: list[_Group], steps: Sequence[int], known: set[int]
) -> list[str]:
    notes = []
    merged = "each shows the largest of its values, and the JSON report has them all"
    if len(rows) < len(magnitudes.modules):
        notes.append(f"{len(magnitudes.modules):,} modules are drawn in {len(rows):,} rows: {merged}")
    if len(columns) < len(steps):
        notes.append(f"{len(steps):,} steps are drawn in {len(columns):,} columns: {merged}")
    unseen = [f"{step:,}" for step in steps if step not in known]
    if unseen:
        notes.append(f"magnitudes were not sampled at step {', '.join(unseen[:5])}: the column is there for its mark")
    return notes
