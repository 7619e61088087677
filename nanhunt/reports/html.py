"""The report as one HTML file that needs nothing else: no network, no other files.

Everything in a report may come from a hostile file: a module's name, a source line, an exception. Jinja escapes all of
it, ``printable`` takes out what would reorder or hide text, and the page's content security policy runs no script but
ours and loads nothing from anywhere.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nanhunt.findings import ChainLink, DataTable, Finding, Report
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome
from nanhunt.reports import words
from nanhunt.reports.explained import explained
from nanhunt.reports.heat import heat_maps
from nanhunt.reports.json_report import SCHEMA_VERSION

MAX_TABLE_ROWS = 1000
MAX_FINDINGS = 200

_FOLDER = Path(__file__).with_name("page")
_PHASES = ("forward", "backward", "step")


def render(report: Report) -> str:
    """The report as a page."""
    has_plots = report.magnitudes is not None and bool(report.magnitudes.modules)
    own = (_FOLDER / "report.js").read_text(encoding="utf-8")
    scripts = [_plotly(), own] if has_plots else [own]
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
    )
    environment.filters |= {"number": words.shown, "line_of": words.line_of, "place": words.place}
    page = environment.get_template("report.html").render(
        report=report,
        css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        headline=words.nothing_found(report) if not report.findings else "",
        is_unexplained=words.is_unexplained(report),
        findings=[_finding(finding) for finding in report.findings[:MAX_FINDINGS]],
        chain=[_link(link) for link in report.chain],
        heat=heat_maps(report.magnitudes, report.findings) if has_plots and report.magnitudes else None,
        grid=list(_grid(report)),
        experiments=[_experiment(result) for result in report.experiments],
        tables=[_table(table) for table in report.tables],
        summary=words.summary(report),
        schema_version=SCHEMA_VERSION,
    )
    return page + "\n"


def _printed(value: Any) -> Any:
    """What an expression of the template puts into the page."""
    return words.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _plotly() -> str:
    """The plotting library itself: 4.8 MB, and therefore only in pages with a plot."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _hash(script: str) -> str:
    """What the page's policy knows the script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _finding(finding: Finding) -> dict[str, Any]:
    where = finding.location
    return {
        "finding": finding,
        "name": where.tensor or where.module,
        "cause": words.cause_of(finding),
        "source": where.source.text.strip() if where.source is not None else "",
        "page": explained(finding.code),
    }


def _link(link: ChainLink) -> dict[str, Any]:
    share = link.num_nonfinite / link.num_elements if link.num_elements and link.num_nonfinite is not None else None
    width = None if share is None else max(100 * share, 1.5 if share else 0)
    return {"what": link.what, "detail": link.detail, "share": _percent(share), "width": width}


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "all" if share == 1 else f"{100 * share:.2g} %" if share < 0.995 else "nearly all"


def _grid(report: Report) -> Iterator[dict[str, Any]]:
    """Rows of weights, in each the batches."""
    for (weights, seed), cells in itertools.groupby(report.grid, key=lambda cell: (cell.weights, cell.seed)):
        name = weights if seed is None else f"{weights} (seed {seed})"
        yield {"weights": name, "cells": {cell.batch: _cell(cell) for cell in cells}}


def _cell(cell: GridCell) -> dict[str, Any]:
    outcome = cell.outcome
    failed = _PHASES.index(outcome.failed_phase) if outcome.failed_phase else len(_PHASES)
    phases = [(phase, number < failed) for number, phase in enumerate(_PHASES)]
    return {"is_finite": outcome.is_finite, "phases": phases, "detail": _detail(outcome)}


def _detail(outcome: StepOutcome) -> str:
    if outcome.error:
        return outcome.error
    norm = f", gradient norm {words.shown(outcome.gradient_norm, 3)}" if outcome.is_finite else ""
    return f"loss {words.shown(outcome.loss, 4)}{norm}"


def _experiment(result: ExperimentResult) -> dict[str, Any]:
    outcome = result.outcome
    row = {
        "title": result.title,
        "family": result.family,
        "note": result.skipped or result.note,
        "norm": "",
        "zero": "",
    }
    if outcome is None:
        return row | {"kind": "skipped", "word": "not run"}
    if not outcome.is_finite:
        return row | {"kind": "bad", "word": f"NON-FINITE ({outcome.failed_phase})", "note": outcome.error}
    zero = f"{outcome.num_zero_gradients} of {outcome.gradients.num_tensors}"
    row |= {"norm": words.shown(outcome.gradient_norm, 3), "zero": zero}
    is_mask = result.family == "mask"
    return row | {"kind": "mask" if is_mask else "good", "word": "finite (mask)" if is_mask else "finite"}


def _table(table: DataTable) -> dict[str, Any]:
    rows = table.rows[:MAX_TABLE_ROWS]
    numeric = [words.is_numeric(row[column] for row in table.rows) for column in range(len(table.columns))]
    return {
        "title": table.title,
        "note": table.note,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": [list(zip((words.shown(value, 6) for value in row), numeric, strict=True)) for row in rows],
        "num_hidden": len(table.rows) - len(rows),
    }
