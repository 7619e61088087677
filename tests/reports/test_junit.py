"""JUnit XML: one golden document, and what holds for any report."""

import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from nanhunt.reports import junit

GOLDEN = Path(__file__).parent / "golden" / "report.xml"


def suite_of(report) -> ElementTree.Element:
    root = ElementTree.fromstring(junit.render(report).encode())
    assert root.tag == "testsuites"
    (suite,) = root
    return suite


def test_the_full_report_is_the_golden_document(full_report):
    text = junit.render(full_report)
    if os.environ.get("NANHUNT_BLESS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_findings_fail_rules_without_one_pass_and_skips_are_skipped(audit_report):
    suite = suite_of(audit_report)
    told = {case.get("name"): [child.tag for child in case] for case in suite.iter("testcase")}
    assert told == {
        "NH104 growing-activation blocks.1.norm": ["failure"],
        "NH101": [],
        "NH203": [],
        "the schedule": ["skipped"],
    }
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors", "time")} == {
        "tests": "4",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
        "time": "1.500",
    }
    failure = suite.find("testcase/failure")
    assert failure.get("type") == "warning[NH104]"
    assert failure.get("message") == "output 3.2e+05 at step 2, 3,200 times as large as at first"
    assert suite.find("testcase/skipped").get("message") == "no schedule was given"


def test_where_nothing_was_found_one_test_says_so(traced_report):
    suite = suite_of(replace(traced_report, findings=(), chain=()))
    (case,) = suite.iter("testcase")
    assert case.get("name") == "no operation was found to make a non-finite value that does harm"
    assert len(case) == 0


def test_a_failed_step_that_nothing_explains_is_a_failure(full_report):
    suite = suite_of(replace(full_report, findings=(), skips=()))
    (case,) = suite.iter("testcase")
    assert case.find("failure").get("message") == "the step is not finite, but no operation was found that began it"


def test_hostile_text_stays_text(hostile_report):
    suite = suite_of(hostile_report)
    assert {element.tag for element in suite.iter()} == {
        *("testsuite", "properties", "property", "testcase", "failure", "skipped", "system-out"),
    }
    assert suite.get("name").startswith("<script>document")
    assert "\N{REPLACEMENT CHARACTER}[31m" in suite.get("name")
    # Those of the title: an override of the direction, a null, an escape, half a pair.
    assert suite.get("name").count("\N{REPLACEMENT CHARACTER}") == 4
