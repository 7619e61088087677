"""The rules of the dtype audit on records made by hand."""

from importlib import import_module
from pathlib import Path

import pytest

import nanhunt.rules
from nanhunt.records.dtype_audit import DtypeAudit
from nanhunt.rules.registry import judge_record

MODULES = [
    module
    for path in sorted(Path(nanhunt.rules.__path__[0]).glob("nh4[12]*.py"))
    if (module := import_module(f"nanhunt.rules.{path.stem}")).RULE.judges is DtypeAudit
]


def examples(kind):
    return [
        pytest.param(module.RULE, audit, id=f"{module.RULE.code}-{number}")
        for module in MODULES
        for number, audit in enumerate(getattr(module, kind))
    ]


def test_there_are_eleven():
    assert [module.RULE.code for module in MODULES] == [f"NH{number}" for number in range(410, 421)]


@pytest.mark.parametrize(("rule", "audit"), examples("FLAGGED"))
def test_a_flagged_step_has_a_finding_of_its_rule_and_of_no_other(rule, audit):
    (finding,) = judge_record(audit).findings
    assert (finding.code, finding.cause, finding.certainty) == (rule.code, rule.name, "observed")
    assert finding.message[0].islower() or not finding.message[0].isalpha()
    assert not finding.message.endswith(".")
    assert finding.help
    assert finding.evidence


@pytest.mark.parametrize(("rule", "audit"), examples("CLEAN"))
def test_a_clean_step_has_no_finding_of_its_rule(rule, audit):
    assert rule.judge(audit) is None
    assert rule.code in judge_record(audit).passes


def test_nothing_seen_is_nothing_found():
    judged = judge_record(DtypeAudit())
    assert judged.findings == ()
    assert len(judged.passes) == 11
