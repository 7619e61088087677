"""Every rule: its own examples, its page, its names."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import nanhunt.rules
from nanhunt.errors import NanhuntError
from nanhunt.findings import Finding
from nanhunt.records.health import Health
from nanhunt.records.ops import OpRecord, StateSource, ValueFacts
from nanhunt.rules import registry
from nanhunt.rules.pages import HEADINGS, find_rule, page
from nanhunt.rules.registry import Case, Rule, all_rules, judge, judge_record

FILES = sorted(path.stem for path in Path(nanhunt.rules.__path__[0]).glob("nh*.py"))
MODULES = [import_module(f"nanhunt.rules.{name}") for name in FILES]
FACTS = (ValueFacts((4,), "float32", num_nan=1),)

each_rule = pytest.mark.parametrize("module", MODULES, ids=FILES)


def examples(kind, judges=(Case, Health)):
    return [
        pytest.param(module.RULE, case, id=f"{module.RULE.code}-{number}")
        for module in MODULES
        for number, case in enumerate(getattr(module, kind))
        if module.RULE.judges in judges
    ]


def test_every_file_with_a_rule_is_found():
    assert len(FILES) >= 9
    assert [rule.code for rule in all_rules()] == [name[:5].upper() for name in FILES]
    assert list(all_rules()) == [module.RULE for module in MODULES]


@each_rule
def test_file_code_and_name_agree(module):
    file = module.__name__.rpartition(".")[2]
    assert re.fullmatch(r"nh[0-9]{3}_[a-z0-9_]+", file)
    assert module.RULE.code == file[:5].upper()
    assert module.RULE.name == file[6:].replace("_", "-")


def test_codes_and_names_are_used_once():
    assert len({rule.code for rule in all_rules()}) == len(FILES)
    assert len({rule.name for rule in all_rules()}) == len(FILES)


def test_a_code_used_twice_is_refused(monkeypatch):
    taken = all_rules()[0]
    monkeypatch.setattr(registry, "import_module", lambda name: type("module", (), {"RULE": taken}))
    with pytest.raises(NanhuntError, match=f"rule code {taken.code} is taken twice"):
        registry.find_rules.__wrapped__()


@each_rule
def test_every_rule_has_both_kinds_of_example(module):
    assert module.FLAGGED
    assert module.CLEAN


@pytest.mark.parametrize(("rule", "case"), examples("FLAGGED"))
def test_flagged_examples_are_judged(rule: Rule, case: Case):
    judgement = rule.judge(case)
    assert judgement is not None
    assert judgement.message
    for text in (judgement.message, *judgement.notes, *judgement.help):
        assert "\n" not in text
        assert not text.endswith(".")
        assert text == text.strip()
        assert not re.search(r"(?<![0-9,.])1 (?:elements|rows|gradients|matrices)\b", text), text
    assert "please" not in judgement.message.lower()


@pytest.mark.parametrize(("rule", "case"), examples("CLEAN"))
def test_clean_examples_are_not(rule: Rule, case: Case):
    assert rule.judge(case) is None


@pytest.mark.parametrize(("rule", "case"), examples("FLAGGED", (Case,)))
def test_a_flagged_example_becomes_a_finding_of_its_rule(rule: Rule, case: Case):
    finding = judge(replace(case, step=19))
    assert (finding.code, finding.name, finding.cause) == (rule.code, rule.name, rule.cause)
    assert finding.certainty == ("unknown" if rule.cause == "unknown" else "observed")
    assert finding.location.step == 19


@pytest.mark.parametrize(("rule", "health"), examples("FLAGGED", (Health,)))
def test_a_flagged_run_has_a_finding_of_its_rule(rule: Rule, health: Health):
    (finding,) = (finding for finding in judge_record(health).findings if finding.code == rule.code)
    assert (finding.name, finding.cause, finding.severity) == (rule.name, rule.cause, rule.severity)
    assert finding.certainty == "observed"
    assert finding.location.step is not None
    assert finding.location.phase in ("forward", "backward", "optimizer")


@pytest.mark.parametrize(("rule", "health"), examples("CLEAN", (Health,)))
def test_a_clean_run_has_no_finding_of_any_rule(rule: Rule, health: Health):
    assert judge_record(health).findings == ()


def test_only_an_infinite_moment_and_a_collapsed_scale_are_errors_of_a_run():
    severities = {rule.code: rule.severity for rule in all_rules() if rule.judges is Health}
    errors = {code for code, severity in severities.items() if severity == "error"}
    assert errors == {"NH303", "NH403"}
    assert set(severities) == {"NH102", "NH104", "NH204", "NH205", "NH206", "NH303", "NH304", "NH403"}


def test_the_earliest_finding_of_a_run_comes_first():
    late, early = (module.FLAGGED[0] for module in MODULES if module.RULE.code in ("NH303", "NH204"))
    health = replace(late, moments=late.moments or early.moments, steps=late.steps or early.steps)
    found = [(finding.location.step, finding.code) for finding in judge_record(health).findings]
    assert found == [(0, "NH204"), (5, "NH303")]


@each_rule
def test_the_page_has_its_headings_in_order(module):
    text = module.__doc__
    assert text.startswith(f"{module.RULE.name}: ")
    assert text.splitlines()[0].endswith(".")
    headings = re.findall(r"^([A-Z][A-Za-z ]+):$", text, flags=re.MULTILINE)
    assert headings[:2] == ["What it does", "Why it matters"]
    assert [heading for heading in HEADINGS if heading in headings] == headings
    for body in re.split(r"^[A-Z][A-Za-z ]+:$", text, flags=re.MULTILINE)[1:]:
        assert body.strip()
        assert all(line.startswith("    ") for line in body.splitlines() if line)


@each_rule
def test_the_page_is_found_by_code_and_by_name(module):
    rule = module.RULE
    for word in (rule.code, rule.code.lower(), rule.name):
        assert find_rule(word) is rule
    assert page(rule).startswith(f"{rule.code} {rule.name}: ")


def test_an_unknown_code_is_one_line():
    with pytest.raises(NanhuntError) as caught:
        find_rule("NH999")
    assert str(caught.value) == "no rule 'NH999'; `nanhunt rules` lists them"


# What no rule knows


@pytest.mark.parametrize("phase", ["forward", "backward", "clip", "optimizer", "data", "weights"])
def test_an_operation_that_no_rule_knows_is_still_a_finding(phase):
    finding = judge(Case(OpRecord(3, "mine::op", "birth", phase, "head", None, outputs=FACTS)))
    assert finding.cause == "unknown"
    assert finding.certainty == "unknown"
    assert finding.code == ("NH201" if phase == "backward" else "NH101")
    assert "mine::op" in finding.message


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("batch", "NH601"),
        ("parameter", "NH702"),
        ("buffer", "NH703"),
        ("module attribute", "NH707"),
        ("optimizer state", "NH704"),
        ("constant", "NH706"),
        ("uninitialised memory", "NH705"),
        ("output gradient", "NH602"),
        ("collective", "NH207"),
        ("a kind that no rule knows", "NH701"),
    ],
)
def test_every_kind_of_state_has_a_rule(kind, code):
    finding = judge(Case(StateSource(-1, kind, "x", FACTS[0], (1,))))
    assert finding.code == code
    assert isinstance(finding, Finding)


def test_a_rule_that_names_a_cause_goes_before_one_that_does_not(monkeypatch):
    known = Rule("NH999", "late", "a-cause", lambda case: registry.Judgement("known"))
    unknown = Rule("NH100", "early", "unknown", lambda case: registry.Judgement("unknown"))
    monkeypatch.setattr(registry, "all_rules", lambda: (unknown, known))
    assert judge(Case(OpRecord(3, "mine::op", "birth", "forward", "", None, outputs=FACTS))).code == "NH999"


def test_rules_are_judged_without_torch():
    lines = [
        "import sys",
        "from nanhunt.rules.registry import all_rules, judge",
        "for rule in all_rules():",
        "    for case in sys.modules[rule.judge.__module__].FLAGGED: rule.judge(case)",
        "print('torch' in sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
