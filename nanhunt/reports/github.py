"""Annotations that GitHub shows beside the lines of a pull request: a workflow command for each finding.

The commands and how they are escaped: docs.github.com, "Workflow commands for GitHub Actions".
"""

from nanhunt.findings import Finding, Report
from nanhunt.reports.words import cause_of, is_unexplained, nothing_found, place, printable, short_path, summary


def render(report: Report) -> str:
    """One line for each finding, and one that says what was concluded and what was not done."""
    lines = [_annotation(finding) for finding in report.findings]
    if is_unexplained(report):
        lines.append(_command("error", {"title": report.title}, [nothing_found(report)]))
    skips = [f"not done: {skip.what}: {skip.reason}" for skip in report.skips]
    verdict = [f"verdict: {report.verdict.certainty}", *report.verdict.sentences, *skips, summary(report)]
    lines.append(_command("notice", {"title": report.title}, verdict))
    return "\n".join(lines) + "\n"


def _annotation(finding: Finding) -> str:
    where = finding.location
    properties = {"title": f"{finding.code} {finding.name}"}
    if where.source is not None:
        properties = {"file": short_path(where.source.file), "line": str(where.source.line), **properties}
    named = ", ".join(part for part in (place(where), where.tensor or where.module) if part)
    notes = [f"note: {note}" for note in finding.notes]
    helps = [f"help: {text}" for text in finding.help]
    lines = [finding.message, f"in {named}", f"cause: {cause_of(finding)}", *notes, *helps]
    return _command(finding.severity, properties, [*lines, f"explain: nanhunt explain {finding.code}"])


def _command(kind: str, properties: dict[str, str], lines: list[str]) -> str:
    named = ",".join(f"{key}={_escaped(value, is_property=True)}" for key, value in properties.items())
    return f"::{kind} {named}::{'%0A'.join(map(_escaped, lines))}"


def _escaped(text: str, is_property: bool = False) -> str:
    """The text without what would end the command or begin another."""
    text = printable(text).replace("%", "%25")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
