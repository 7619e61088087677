"""The report of an audit."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanhunt.errors import NanhuntError, first_line
from nanhunt.findings import DataTable, Report, Skip, Verdict
from nanhunt.numerics import count
from nanhunt.rules.registry import judge_record

NOTHING = "nothing was found"


def report_of(
    title: str,
    records: Iterable[Any],
    *,
    facts: Sequence[tuple[str, str]] = (),
    tables: Sequence[DataTable] = (),
    skips: Sequence[Skip] = (),
    seconds: float = 0.0,
    absence: str = NOTHING,
) -> Report:
    """What the rules say of the records of one audit.

    Args:
        title: What was audited.
        records: What was measured; every rule for a record's type is asked.
        facts: Short lines about it.
        tables: What was measured, for a person to read.
        skips: What could not be measured.
        seconds: Wall time.
        absence: What to say where there is no finding.
    """
    judged = [judge_record(record) for record in records]
    findings = tuple(finding for one in judged for finding in one.findings)
    passes = tuple(code for one in judged for code in one.passes)
    all_skips = dict.fromkeys([*skips, *(skip for one in judged for skip in one.skips)])
    errors = sum(finding.severity == "error" for finding in findings)
    numbers = f"{count(errors, 'error')}, {count(len(findings) - errors, 'warning')}"
    sentences = (
        f"{numbers}; {count(len(passes), 'rule')} found nothing",
        "an audit observes; no step was run again with one thing changed",
    )
    return Report(
        title=title,
        facts=tuple(facts),
        findings=findings,
        chain=(),
        verdict=Verdict("observed", sentences),
        skips=tuple(all_skips),
        seconds=seconds,
        passes=passes,
        tables=tuple(tables),
        absence=absence if not findings else "",
    )


def joined(title: str, reports: Sequence[Report]) -> Report:
    """Several audits as one report."""
    findings = tuple(finding for report in reports for finding in report.findings)
    sentences = tuple(f"{report.title}: {report.verdict.sentences[0]}" for report in reports)
    return Report(
        title=title,
        facts=tuple(dict.fromkeys(fact for report in reports for fact in report.facts)),
        findings=findings,
        chain=(),
        verdict=Verdict("observed", sentences),
        skips=tuple(dict.fromkeys(skip for report in reports for skip in report.skips)),
        seconds=sum(report.seconds for report in reports),
        passes=tuple(code for report in reports for code in report.passes),
        tables=tuple(table for report in reports for table in report.tables),
        absence=_absence(reports) if not findings else "",
    )


def skipped(what: str, error: Exception) -> Report:
    """The report of an audit that could not run."""
    if isinstance(error, NanhuntError):
        message, reason = error.message, str(error)
    else:
        message = reason = f"{type(error).__name__}: {first_line(error)}"
    return Report(what, (), (), (), Verdict("unknown", (f"not done: {message}",)), skips=(Skip(what, reason),))


def _absence(reports: Sequence[Report]) -> str:
    """What it means that no audit found anything: the words of one that had to stop come before the others."""
    said = (report.absence for report in reports if report.absence)
    return next((words for words in said if words != NOTHING), NOTHING)
