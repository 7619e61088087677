"""The report a program reads: strict JSON, numbers as numbers, non-finite ones as words."""

import json
import math
from dataclasses import fields, replace

import pytest

from nanhunt.findings import Report
from nanhunt.reports import REPORTS, json_report


def strictly(text: str):
    """What a parser without Python's extensions to JSON would read."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_check_for_strict_json_can_fail():
    with pytest.raises(ValueError, match="NaN is not JSON"):
        strictly(json.dumps({"loss": math.nan}))


def test_the_full_report_is_strict_json_with_every_field(full_report):
    data = strictly(json_report.render(full_report))
    assert list(data) == ["schema_version", *(item.name for item in fields(Report))]
    assert data["schema_version"] == 2
    assert data["title"] == "replay of bad_batch_000019.pt"
    assert data["num_steps"] == 11
    assert data["facts"][0] == ["step", "19"]
    assert data["verdict"]["flipped"] == ["detach-offender", "nan-to-num"]
    assert data["skips"][0]["what"] == "the captured control batch"


def test_a_finding_keeps_its_numbers(full_report):
    finding = strictly(json_report.render(full_report))["findings"][0]
    assert finding["code"] == "NH203"
    assert finding["location"]["step"] == 19
    assert finding["location"]["source"]["line"] == 118
    evidence = finding["evidence"]
    assert evidence["matrix_index"] == 371
    assert evidence["eigenvalue"] == 1.0000098943710327
    assert evidence["tied_positions"] == [15, 16]
    assert evidence["min_gap"] == 0.0
    assert evidence["is_batched"] is True
    assert evidence["worst"] == "-Infinity"


def test_non_finite_numbers_are_words(full_report):
    data = strictly(json_report.render(full_report))
    assert data["baseline"]["loss"] == 0.173286795
    assert data["baseline"]["gradient_norm"] == "NaN"
    assert data["grid"][2]["outcome"]["loss"] == "NaN"
    endless = replace(full_report, seconds=math.inf)
    assert strictly(json_report.render(endless))["seconds"] == "Infinity"


def test_every_float_comes_back_bit_for_bit(full_report):
    values = [0.1, 1e-45, 1.7976931348623157e308, -0.0, 5e-324]
    finding = replace(full_report.findings[0], evidence={"values": values, "nested": {"pair": (1, 2.5)}})
    back = strictly(json_report.render(replace(full_report, findings=(finding,))))["findings"][0]["evidence"]
    assert [value.hex() for value in back["values"]] == [value.hex() for value in values]
    assert back["nested"] == {"pair": [1, 2.5]}


def test_control_characters_are_escaped(full_report):
    text = json_report.render(replace(full_report, title="a\x1b[31m\x00\u2028b"))
    assert text.isascii()
    assert "\x1b" not in text
    assert strictly(text)["title"] == "a\x1b[31m\x00\u2028b"


def test_every_format_renders_the_full_report(full_report):
    assert list(REPORTS) == ["console", "json", "html", "github", "junit"]
    assert all(render(full_report) for render in REPORTS.values())
