"""docs/report.schema.json describes the JSON of every kind of report, and nothing else."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import jsonschema
import pytest

from nanhunt import findings
from nanhunt.records import ops, steps
from nanhunt.reports import json_report

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("kind", ["full_report", "traced_report", "audit_report", "hostile_report"])
def test_every_kind_of_report_fits_the_schema(kind, validator, request):
    validator.validate(json.loads(json_report.render(request.getfixturevalue(kind))))


def test_a_traced_loop_fits_the_schema(validator):
    import torch

    import nanhunt

    model = torch.nn.Linear(2, 1)
    with nanhunt.trace(model) as hunt:
        model(torch.ones(1, 2)).sub(1e9).relu().log().sum().backward()
    report = hunt.report()
    assert report.first.code == "NH501"
    validator.validate(json.loads(json_report.render(report)))


def test_the_schema_has_the_fields_of_the_dataclasses():
    classes = {name: kind for one in (findings, steps, ops) for name, kind in vars(one).items() if is_dataclass(kind)}
    described = {name: part for name, part in SCHEMA["$defs"].items() if part.get("type") == "object"}
    for name, part in described.items():
        assert list(part["properties"]) == part["required"] == [item.name for item in fields(classes[name])], name
    names = [item.name for item in fields(findings.Report)]
    assert list(SCHEMA["properties"]) == SCHEMA["required"] == ["schema_version", *names]
    assert SCHEMA["properties"]["schema_version"]["const"] == json_report.SCHEMA_VERSION


def test_an_unknown_field_or_a_missing_one_does_not_fit(full_report, validator):
    data = json.loads(json_report.render(full_report))
    assert not validator.is_valid({**data, "colour": "red"})
    del data["findings"][0]["location"]
    assert not validator.is_valid(data)
