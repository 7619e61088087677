"""Rules of other packages: found by entry point, judged, listed, explained and ignored as if they were our own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nanhunt.cli import app as program
from nanhunt.findings import Report, Skip, Verdict
from nanhunt.records.health import Health, StepHealth
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules import registry
from nanhunt.rules.registry import Case, judge, judge_record

RULES = '''"""long-run: more steps than anybody has the patience for.

What it does:
    Counts steps.

Why it matters:
    Time is short.
"""

from nanhunt.findings import Location, Skip
from nanhunt.records.health import Health
from nanhunt.rules.registry import Case, Judgement, Rule


def judge_run(health):
    if not health.steps:
        return Skip("long-run", "no step was seen")
    if len(health.steps) < 3:
        return None
    return Judgement("it took 3 steps", {"num_steps": 3}, location=Location("optimizer", step=2))


def judge_offender(case):
    op = case.op
    return Judgement("the operation is ours") if op is not None and op.op == "acme::op" else None


def fails(record):
    raise RuntimeError("no luck\\nat all")


LONG = Rule("ACME101", "long-run", "impatience", judge_run, Health, "warning", "preview")
OURS = Rule("ACME102", "our-operation", "ours", judge_offender)
FAILS = Rule("ACME103", "failing-rule", "bad-luck", fails, Health)
FAILS_CASE = Rule("ACME104", "failing-rule-of-offenders", "bad-luck", fails, Case)
TAKEN = Rule("NH304", "mine", "mine", judge_run, Health)
NOTHING = 5
'''

LONG_RUN = Health(steps=tuple(StepHealth(step, 1.0, 1e-3) for step in range(3)))
OFFENDER = Case(
    OpRecord(3, "acme::op", "birth", "forward", "", None, outputs=(ValueFacts((4,), "float32", num_nan=1),))
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with these entry points, as pip would leave it on the path."""

    def put(**points):
        site = tmp_path / "site"
        info = site / "acme_rules-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rules\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))
        (site / "acme_rules.py").write_text(RULES)
        (site / "acme_broken.py").write_text("import absent_module\n")
        (site / "acme_mistyped.py").write_text("def (:\n")
        monkeypatch.syspath_prepend(str(site))
        registry.find_rules.cache_clear()
        return site

    yield put
    registry.find_rules.cache_clear()
    for name in ("acme_rules", "acme_broken", "acme_mistyped"):
        sys.modules.pop(name, None)


@pytest.fixture
def nanhunt(tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *args])
        code = 0
        try:
            program.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def codes(rules):
    return [rule.code for rule in rules]


def test_installed_rules_are_found_after_our_own(install):
    own = codes(registry.all_rules())
    install(run="acme_rules:LONG", offender="acme_rules:OURS")
    assert codes(registry.all_rules()) == sorted([*own, "ACME101", "ACME102"])
    assert registry.find_rules().unusable == ()


def test_installed_rule_judges_a_record(install):
    install(run="acme_rules:LONG")
    judged = judge_record(LONG_RUN)
    [finding] = judged.findings
    assert (finding.code, finding.name, finding.severity, finding.cause) == (
        "ACME101",
        "long-run",
        "warning",
        "impatience",
    )
    assert (finding.message, finding.evidence) == ("it took 3 steps", {"num_steps": 3})
    assert "ACME101" not in judged.passes
    assert "ACME101" in judge_record(Health(steps=LONG_RUN.steps[:1])).passes
    assert judge_record(Health()).skips == (Skip("ACME101 long-run", "no step was seen"),)


def test_rule_judges_a_record_of_its_own_type(monkeypatch):
    @dataclass(frozen=True)
    class Weather:
        rain: bool

    def judge_weather(weather):
        return registry.Judgement("it rains", location=registry.Location("data")) if weather.rain else None

    rule = registry.Rule("ACME900", "rain", "rain", judge_weather, Weather)
    monkeypatch.setattr(registry, "all_rules", lambda: (rule,))
    assert codes(judge_record(Weather(True)).findings) == ["ACME900"]
    assert judge_record(Weather(False)) == ((), ("ACME900",), ())


def test_installed_rule_judges_a_first_offender(install):
    assert judge(OFFENDER).code == "NH101"
    install(offender="acme_rules:OURS")
    finding = judge(OFFENDER)
    assert (finding.code, finding.cause, finding.certainty, finding.severity) == (
        "ACME102",
        "ours",
        "observed",
        "error",
    )
    assert finding.location.op == "acme::op"


def test_installed_rule_is_listed_and_explained(install, nanhunt):
    install(run="acme_rules:LONG")
    code, out, err = nanhunt("rules")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["ACME101", "long-run", "warning", "preview"]
    for word in ("ACME101", "acme101", "long-run"):
        code, out, err = nanhunt("explain", word)
        assert (code, err) == (0, "")
        assert out.startswith("ACME101 long-run: more steps than anybody has the patience for.\n")
    fields = json.loads(nanhunt("explain", "ACME101", "--json")[1])
    assert fields == {
        "code": "ACME101",
        "name": "long-run",
        "cause": "impatience",
        "severity": "warning",
        "status": "preview",
        "judges": "Health",
        "module": "acme_rules",
        "summary": "more steps than anybody has the patience for.",
        "sections": {"What it does": "Counts steps.", "Why it matters": "Time is short."},
    }
    assert fields["code"] in [row["code"] for row in json.loads(nanhunt("rules", "--json")[1])]


def test_rule_without_a_docstring_is_explained_as_far_as_it_goes(install, nanhunt):
    site = install(run="acme_rules:LONG")
    (site / "acme_rules.py").write_text(RULES.partition('"""\n\n')[2])
    assert nanhunt("explain", "ACME101") == (0, "ACME101 long-run: acme_rules has no docstring.\n", "")
    fields = json.loads(nanhunt("explain", "ACME101", "--json")[1])
    assert (fields["summary"], fields["sections"]) == ("", {})


def test_installed_rule_is_ignored_with_a_reason(install):
    from nanhunt.settings import ignored_rules

    install(run="acme_rules:LONG", offender="acme_rules:OURS")
    assert ignored_rules(["ACME101=we wait"]) == {"ACME101": "we wait"}
    assert ignored_rules(["acme10=x"]) == {"ACME101": "x", "ACME102": "x"}
    report = Report("a run", (), judge_record(LONG_RUN).findings, (), Verdict("observed", ()))
    ignoring = report.ignoring(ignored_rules(["long-run=we wait"]))
    assert ignoring.findings == ()
    assert ignoring.skips == (Skip("ACME101 long-run", "ignored: we wait"),)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("acme_broken:RULE", "ModuleNotFoundError: No module named 'absent_module'"),
        ("acme_mistyped:RULE", "SyntaxError: "),
        ("acme_absent:RULE", "ModuleNotFoundError: No module named 'acme_absent'"),
        ("acme_rules:ABSENT", "AttributeError: module 'acme_rules' has no attribute 'ABSENT'"),
        ("acme_rules:NOTHING", "it is a int, not a Rule"),
        ("acme_rules:judge_run", "it is a function, not a Rule"),
    ],
)
def test_rule_that_cannot_be_loaded_is_a_skip_and_leaves_the_others_alone(install, nanhunt, value, reason):
    own = codes(registry.all_rules())
    install(broken=value, run="acme_rules:LONG")
    assert codes(registry.all_rules()) == sorted([*own, "ACME101"])
    judged = judge_record(LONG_RUN)
    assert codes(judged.findings) == ["ACME101"]
    [skip] = judged.skips
    assert skip.what == f"the rule broken ({value})"
    assert skip.reason.startswith(reason)
    code, out, err = nanhunt("rules")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == codes(registry.all_rules())
    assert err.startswith(f"nanhunt: the rule broken ({value}) cannot be used: {reason}")
    assert err.count("\n") == 1


def test_rule_that_fails_is_a_skip_and_leaves_the_others_alone(install):
    install(fails="acme_rules:FAILS", run="acme_rules:LONG")
    judged = judge_record(LONG_RUN)
    assert codes(judged.findings) == ["ACME101"]
    assert judged.skips == (Skip("ACME103 failing-rule", "the rule failed: RuntimeError: no luck"),)
    assert "ACME103" not in judged.passes


def test_rule_that_fails_on_an_offender_is_a_note_on_what_another_says(install):
    install(fails="acme_rules:FAILS_CASE")
    finding = judge(OFFENDER)
    assert finding.code == "NH101"
    assert "ACME104 could not judge: the rule failed: RuntimeError: no luck" in finding.notes


@pytest.mark.parametrize("args", [["rules"], ["explain", "NH203"], ["replay", "x.pt", "--ignore", "NH304=x"]])
def test_code_that_is_taken_is_one_line_that_says_by_whom(install, nanhunt, args):
    install(mine="acme_rules:TAKEN")
    assert nanhunt(*args) == (
        2,
        "",
        "nanhunt: rule code NH304 is taken twice: by nanhunt.rules.nh304_lost_update and acme_rules\n",
    )
    assert nanhunt(*args, "--git-bisect")[0] == 125


def test_installed_rule_is_there_for_the_program_itself_without_torch(install, tmp_path):
    site = install(run="acme_rules:LONG")
    lines = [
        "import sys; sys.argv = ['nanhunt', 'explain', 'ACME101']",
        "from nanhunt.cli.app import app; app(standalone_mode=False)",
        "print('torch' in sys.modules)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ACME101 long-run: ")
    assert done.stdout.endswith("\nFalse\n")
