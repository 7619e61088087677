"""What the reports say alike: names, numbers and places as words."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanhunt.findings import Finding, Location, Report
from nanhunt.numerics import count

# As tables write them: 1,280  -0.5  6.4e-08  12.5 %  x3.2
_NUMBER = re.compile(r"[-+x]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?%)?|[-+]?inf|nan", re.IGNORECASE)


def printable(text: str) -> str:
    """The text as it is, without what a terminal or a browser would obey: names and paths come from files."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4))


def short_path(file: str) -> str:
    """The file as seen from the working folder, where it lies below it."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def shown(value: Any, digits: int = 9) -> str:
    """A number, or several, for a person; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(item, digits) for item in value)}]"
    return "" if value is None else str(value)


def place(where: Location) -> str:
    """Operation, phase, and as far as they say something step, part of the step and process."""
    named = " of ".join(part for part in (where.op, where.forward_op) if part)
    step = f"step {where.step}" if where.step is not None else ""
    micro_step = f"micro-step {where.micro_step}" if where.micro_step else ""
    rank = f"rank {where.rank}" if where.rank else ""
    return ", ".join(part for part in (named, where.phase, step, micro_step, rank) if part)


def line_of(where: Location) -> str:
    """File and line, or nothing."""
    return f"{short_path(where.source.file)}:{where.source.line}" if where.source is not None else ""


def cause_of(finding: Finding) -> str:
    """The cause and how certain it is, where that is not the same word."""
    return finding.cause if finding.cause == finding.certainty else f"{finding.cause} ({finding.certainty})"


def nothing_found(report: Report) -> str:
    """What the absence of a finding means, which is not always that all is well."""
    if report.absence:
        return report.absence
    if is_unexplained(report):
        return "the step is not finite, but no operation was found that began it"
    return "no operation was found to make a non-finite value that does harm"


def is_unexplained(report: Report) -> bool:
    """Whether the step failed and nothing says why."""
    return not report.findings and report.baseline is not None and not report.baseline.is_finite


def summary(report: Report) -> str:
    """Everything counted, and the time it took."""
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    parts = [count(errors, "error")] if errors else []
    parts += [count(warnings, "warning")] if warnings else []
    parts = parts or ["no finding"]
    if report.passes:
        parts.append(f"{count(len(report.passes), 'rule')} found nothing")
    if report.skips:
        parts.append(f"{len(report.skips):,} not done")
    run = f"{count(report.num_steps, 'step')} run" if report.determinism is not None else "done"
    return f"{', '.join(parts)}; {run} in {report.seconds:.1f} s"


def is_numeric(values: Iterable[object]) -> bool:
    """Whether a column of a table holds numbers and nothing else, blanks and dashes apart."""
    known = [value for value in values if value not in ("", "-", None)]
    return bool(known) and all(_is_number(value) for value in known)


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)
