"""Annotations for GitHub: one golden text, and what holds for any report."""

import os
import re
from dataclasses import replace
from pathlib import Path

from nanhunt.records.ops import SourceLine
from nanhunt.reports import github

GOLDEN = Path(__file__).parent / "golden" / "report.github"
COMMAND = re.compile(r"::(error|warning|notice) ((?:[a-z]+=[^,:\r\n]*,?)+)::([^\r\n]*)")


def commands(report) -> list[tuple[str, dict[str, str], str]]:
    """What GitHub would read: kind, properties, message; every line must be a command."""
    read = []
    for line in github.render(report).splitlines():
        kind, properties, message = COMMAND.fullmatch(line).groups()
        read.append((kind, dict(pair.split("=", 1) for pair in properties.split(",")), message))
    return read


def test_the_full_report_reads_as_the_golden_file(full_report):
    text = github.render(full_report)
    if os.environ.get("NANHUNT_BLESS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_every_finding_is_one_command_of_its_severity(full_report):
    kinds = [kind for kind, _, _ in commands(full_report)]
    assert kinds == ["error", "warning", "notice"]


def test_the_file_is_named_from_the_working_folder(traced_report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SourceLine(str(tmp_path / "src" / "train.py"), 7, "x")
    first = traced_report.findings[0]
    here = replace(first, location=replace(first.location, source=source))
    _, properties, _ = commands(replace(traced_report, findings=(here,)))[0]
    assert properties == {"file": "src/train.py", "line": "7", "title": "NH501 log-of-nonpositive"}


def test_what_would_end_a_command_is_escaped(traced_report):
    source = SourceLine("/a,b:c%.py", 7, "x")
    first = traced_report.findings[0]
    place = replace(first.location, source=source)
    finding = replace(first, message="50 %\n::error::no", location=place)
    line = github.render(replace(traced_report, findings=(finding,))).splitlines()[0]
    assert line.startswith(
        "::error file=/a%2Cb%3Ac%25.py,line=7,title=NH501 log-of-nonpositive::50 %25\N{REPLACEMENT CHARACTER}::"
    )


def test_a_failed_step_that_nothing_explains_is_an_error(full_report):
    (kind, _, message), _ = commands(replace(full_report, findings=()))
    assert (kind, message) == ("error", "the step is not finite, but no operation was found that began it")


def test_hostile_text_begins_no_command(hostile_report):
    assert [kind for kind, _, _ in commands(hostile_report)] == ["error", "notice"]


def test_skips_are_told(audit_report):
    assert "not done: the schedule: no schedule was given" in commands(audit_report)[-1][2]
