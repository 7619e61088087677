"""The report as JUnit XML: findings are failed tests, rules that found nothing passed ones, skips skipped ones."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from nanhunt.findings import Finding, Report
from nanhunt.reports.words import cause_of, is_unexplained, line_of, nothing_found, place, printable, shown


def render(report: Report) -> str:
    """The report as an XML document with one test suite."""
    cases = [_failure(finding) for finding in report.findings]
    if is_unexplained(report):
        cases.append(_failed("nanhunt", "the step is finite", "error", nothing_found(report), ""))
    cases += [_case("nanhunt.rules", code) for code in report.passes]
    if not cases:
        cases.append(_case("nanhunt", nothing_found(report)))
    for skip in report.skips:
        skipped = _case("nanhunt.skips", skip.what)
        SubElement(skipped, "skipped", message=printable(skip.reason))
        cases.append(skipped)
    root = Element("testsuites", name="nanhunt")
    suite = SubElement(
        root,
        "testsuite",
        name=printable(report.title),
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors="0",
        skipped=str(len(report.skips)),
        time=f"{report.seconds:.3f}",
    )
    properties = SubElement(suite, "properties")
    for name, value in report.facts:
        SubElement(properties, "property", name=printable(name), value=printable(value))
    suite.extend(cases)
    verdict = [f"verdict: {report.verdict.certainty}", *report.verdict.sentences]
    SubElement(suite, "system-out").text = "\n".join(map(printable, verdict))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _failure(finding: Finding) -> Element:
    where = finding.location
    named = where.tensor or where.module or where.op
    lines = [place(where), where.tensor or where.module, line_of(where)]
    lines += [where.source.text.strip()] if where.source is not None else []
    lines += [f"{key} = {shown(value)}" for key, value in finding.evidence.items()]
    lines += [f"cause: {cause_of(finding)}"]
    lines += [f"note: {note}" for note in finding.notes] + [f"help: {text}" for text in finding.help]
    lines += [f"explain: nanhunt explain {finding.code}"]
    text = "\n".join(printable(line) for line in lines if line)
    kind = f"{finding.severity}[{finding.code}]"
    return _failed("nanhunt.rules", f"{finding.code} {finding.name} {named}".strip(), kind, finding.message, text)


def _failed(group: str, name: str, kind: str, message: str, text: str) -> Element:
    case = _case(group, name)
    SubElement(case, "failure", type=kind, message=printable(message)).text = text
    return case


def _case(group: str, name: str) -> Element:
    return Element("testcase", classname=group, name=printable(name), time="0")
