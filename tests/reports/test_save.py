"""``nanhunt.save_report``: a report in a file, in the form its name asks for."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import nanhunt
from nanhunt.errors import NanhuntError
from nanhunt.findings import Finding, Location, Report, Verdict

REPORT = Report(
    "traced loop",
    (),
    (
        Finding(
            "NH501", "log-of-nonpositive", "error", "observed", "log-of-nonpositive", "log of 0", Location("forward")
        ),
    ),
    (),
    Verdict("observed", ("seen",)),
)


def test_the_name_of_the_file_chooses_the_form(tmp_path: Path):
    saved = {
        suffix: nanhunt.save_report(REPORT, tmp_path / f"report{suffix}")
        for suffix in (".html", ".json", ".xml", ".txt")
    }

    assert saved[".html"].read_text().startswith("<!doctype html>")
    assert json.loads(saved[".json"].read_text())["findings"][0]["code"] == "NH501"
    assert ElementTree.parse(saved[".xml"]).getroot().tag == "testsuites"
    assert "error[NH501]: log of 0" in saved[".txt"].read_text()


def test_the_form_may_be_named(tmp_path: Path):
    file = nanhunt.save_report(REPORT, str(tmp_path / "annotations"), "github")
    assert file.read_text().startswith("::error title=NH501")


def test_an_unknown_form_writes_nothing(tmp_path: Path):
    with pytest.raises(NanhuntError, match="no report format 'pdf'; give one of console, json, html, github, junit"):
        nanhunt.save_report(REPORT, tmp_path / "report", "pdf")
    assert list(tmp_path.iterdir()) == []
