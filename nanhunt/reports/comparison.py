"""The comparison of eager and compiled code for a terminal: 80 columns."""

import textwrap
from collections.abc import Iterator, Sequence

from nanhunt.findings import Finding
from nanhunt.numerics import count
from nanhunt.records.comparison import Difference, StepRun
from nanhunt.reports.console import WIDTH
from nanhunt.reports.words import short_path

_MAX_NAMES = 3


def render(
    runs: Sequence[StepRun],
    apart: Difference | None,
    first: Finding | None,
    verdict: str,
    notes: Sequence[str],
    backend: str,
    seconds: float,
) -> str:
    """The comparison as plain text.

    Args:
        runs: What each way to run the step gave.
        apart: How far eager and compiled code lie apart.
        first: The first offender of the eager run.
        verdict: The conclusion.
        notes: What to bear in mind.
        backend: What compiled the code.
        seconds: Wall time of it all.
    """
    lines = [f"one step as written, compiled by {backend}, and in float64", ""]
    lines.append(f"  {'':<14} {'':<12} {'loss':<12} farthest from float64")
    for run in runs:
        lines += _row(run)
    if apart is not None:
        lines += ["", *_wrapped(f"  eager and compiled code lie apart by {_distance(apart)}", "    ")]
    if any(run.nonfinite for run in runs):
        lines.append("")
    for run in runs:
        if run.nonfinite:
            lines += _wrapped(f"  non-finite in {run.name}: {_listed(run.nonfinite)}", "    ")
    if first is not None:
        lines += ["", *_place(first)]
    lines += ["", *_wrapped(f"verdict: {verdict}", "  ")]
    for note in notes:
        lines += _wrapped(f"  - {note}", "    ")
    lines += ["", f"compared in {seconds:.1f} s"]
    return "\n".join(line.rstrip() for line in lines)


def _row(run: StepRun) -> Iterator[str]:
    if run.skipped:
        yield from _wrapped(f"  {run.name:<14} not run      {run.skipped}", " " * 30)
        return
    word = "raised" if run.error else "NON-FINITE" if run.nonfinite else "finite"
    loss = "" if run.loss is None else f"{run.loss:.6g}"
    distance = _distance(run.difference) if run.difference is not None else ""
    yield from _wrapped(f"  {run.name:<14} {word:<12} {loss:<12} {distance}", " " * 43)
    if run.error:
        yield from _wrapped(f"    {run.error}", "    ")


def _distance(difference: Difference) -> str:
    if not difference.absolute:
        return "0"
    return f"{difference.absolute:.3g} ({100 * difference.relative:.3g}%) in {difference.name}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    rest = len(names) - _MAX_NAMES
    return shown if rest <= 0 else f"{shown} and {count(rest, 'other')}"


def _place(first: Finding) -> Iterator[str]:
    where = first.location
    named = " of ".join(part for part in (where.op, where.forward_op) if part)
    parts = ", ".join(part for part in (named, where.phase, where.tensor or where.module) if part)
    yield from _wrapped(f"  first in eager code: {parts}: {first.message}", "    ")
    if where.source is not None:
        yield from _wrapped(f"    {short_path(where.source.file)}:{where.source.line}", "      ")
        yield from _wrapped(f"    {where.source.text}", "      ")


def _wrapped(text: str, lead: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=lead, drop_whitespace=True, break_on_hyphens=False)
