"""The report of an audit."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanhunt.errors import NanhuntError
from nanhunt.findings import DataTable, Report, Skip, Verdict
from nanhunt.numerics import count
from nanhunt.rules.registry import judge_record


def report_of(
    title: str,
    records: Iterable[Any],
    *,
    facts: Sequence[tuple[str, str]] = (),
    tables: Sequence[DataTable] = (),
    skips: Sequence[Skip] = (),
    seconds: float = 0.0,
) -> Report:
    """What the rules say of the records of one audit.

    Args:
        title: What was audited.
        records: What was measured; every rule for a record's type is asked.
        facts: Short lines about it.
        tables: What was measured, for a person to read.
        skips: What could not be measured.
        seconds: Wall time.
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
        absence="nothing was found" if not findings else "",
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
        absence="nothing was found" if not findings else "",
    )


def skipped(what: str, error: NanhuntError) -> Report:
    """The report of an audit that could not run."""
    sentences = (f"not done: {error.message}",)
    return Report(what, (), (), (), Verdict("unknown", sentences), skips=(Skip(what, str(error)),))
