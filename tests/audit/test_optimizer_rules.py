"""Rules for the records of the optimizer's audit: their own examples."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import nanhunt.rules
from nanhunt.findings import Skip
from nanhunt.records import optimizer_audit
from nanhunt.rules.registry import Judgement, judge_record

FILES = sorted(path.stem for path in Path(nanhunt.rules.__path__[0]).glob("nh3[234]*.py"))
MODULES = [import_module(f"nanhunt.rules.{name}") for name in FILES]
OURS = [module for module in MODULES if module.RULE.judges.__module__ == optimizer_audit.__name__]


def examples(kind):
    return [
        pytest.param(module.RULE, record, id=f"{module.RULE.code}-{number}")
        for module in OURS
        for number, record in enumerate(getattr(module, kind))
    ]


def test_there_are_rules():
    assert len(OURS) >= 26


@pytest.mark.parametrize(("rule", "record"), examples("FLAGGED"))
def test_a_flagged_record_has_a_finding_of_its_rule(rule, record):
    found = [one for one in judge_record(record).findings if one.code == rule.code]
    assert found
    for one in found:
        assert (one.name, one.cause) == (rule.name, rule.cause)
        for text in (one.message, *one.notes, *one.help):
            assert not text.endswith(".")
            assert not re.search(r"(?<![0-9,.])1 (?:elements|parameters|gradients|weights|tensors)\b", text), text


@pytest.mark.parametrize(("rule", "record"), examples("CLEAN"))
def test_a_clean_record_has_none(rule, record):
    assert rule.judge(record) is None


def test_what_cannot_be_judged_is_a_skip():
    unknown = optimizer_audit.GroupFacts(0, 1.0, 1.5, decay="unknown", peak_lr=1.0)
    record = optimizer_audit.GroupSettings("Other", (unknown,))
    judged = judge_record(record)
    assert judged.findings == ()
    assert [skip.what for skip in judged.skips] == ["NH328 diverging-weight-decay"]
    assert not isinstance(OURS[0].RULE.judge(OURS[0].FLAGGED[0]), Skip)
    assert isinstance(OURS[0].RULE.judge(OURS[0].FLAGGED[0]), Judgement)
