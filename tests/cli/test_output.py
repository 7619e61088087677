"""Where a report goes and in which form: ``--json``, ``--format``, ``--out``, ``--ignore``, alike for every verb."""

import json
import os
import subprocess
import sys

import pytest
from verbs import GIVING, Verbs, report

from nanhunt.findings import Finding, Location, Report, Verdict
from nanhunt.reports import REPORTS, console

each_verb = pytest.mark.parametrize("verb", GIVING)

FORMS = """
def short(report):
    return f"{len(report.findings)} found\\n\\n"

def fails(report):
    raise KeyError("steps")

def bare(report):
    return report

NUMBER = 3
"""


@pytest.fixture
def verbs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NANHUNT_DEBUG", raising=False)
    (tmp_path / "my_forms.py").write_text(FORMS)
    made = Verbs(monkeypatch, capsys)
    made.find(report("error"))
    yield made
    sys.modules.pop("my_forms", None)


# Forms


@each_verb
def test_console_is_the_default(verbs, verb):
    code, out, err = verbs(verb, "x.pt")
    assert (code, err) == (1, "")
    assert "error[NH303]: it is so\n" in out
    assert "warning[NH304]: it is so\n" in out
    assert out.endswith("\n")
    assert not out.endswith("\n\n")


@each_verb
def test_json_is_one_strict_object(verbs, verb):
    code, out, err = verbs(verb, "x.pt", "--json")
    assert (code, err) == (1, "")
    data = json.loads(out, parse_constant=pytest.fail)
    assert data["schema_version"] >= 1
    found = [(finding["code"], finding["severity"]) for finding in data["findings"]]
    assert found == [("NH303", "error"), ("NH304", "warning")] * (4 if verb == "audit" else 1)
    assert verbs(verb, "x.pt", "--format", "json")[1] == out


@pytest.mark.parametrize("name", REPORTS)
def test_every_format_is_printed_and_written_alike(verbs, tmp_path, name):
    code, out, err = verbs("audit-init", "x.pt", "--format", name)
    assert (code, err) == (1, "")
    assert "NH303" in out
    assert out.endswith("\n")
    assert verbs("audit-init", "x.pt", "--format", name, "--out", "r") == (1, "", "nanhunt: wrote r\n")
    if name != "console":
        assert (tmp_path / "r").read_text() == out


@each_verb
def test_format_may_be_a_function_of_the_working_folder(verbs, verb):
    code, out, err = verbs(verb, "x.pt", "--format", "my_forms:short")
    assert (code, out, err) == (1, "8 found\n" if verb == "audit" else "2 found\n", "")


@pytest.mark.parametrize(
    ("name", "said", "num_runs"),
    [
        ("pdf", "no report format 'pdf'", 0),
        ("", "no report format ''", 0),
        ("my_forms:", "no report format 'my_forms:'", 0),
        (":short", "report format ':short' cannot be loaded: ValueError: Empty module name", 0),
        ("my_forms:absent", "report format 'my_forms:absent' cannot be loaded: AttributeError: ", 0),
        ("absent_forms:short", "report format 'absent_forms:short' cannot be loaded: ModuleNotFoundError: ", 0),
        ("my_forms:NUMBER", "report format 'my_forms:NUMBER' is a int, not a function", 0),
        ("my_forms:fails", "report format 'my_forms:fails' failed: KeyError: 'steps'", 1),
        ("my_forms:bare", "report format 'my_forms:bare' gave a Report, not text", 1),
    ],
)
def test_wrong_format_is_one_line(verbs, name, said, num_runs):
    code, out, err = verbs("replay", "x.pt", "--format", name)
    assert (code, out, verbs.num_runs) == (2, "", num_runs)
    assert err.startswith(f"nanhunt: {said}")
    assert err.count("\n") <= 2


# Files


@each_verb
@pytest.mark.parametrize(("name", "begins"), [("r.json", "{\n"), ("r.txt", "a"), ("r", "a"), ("R.JSON", "{\n")])
def test_form_of_a_file_is_what_its_name_says(verbs, tmp_path, verb, name, begins):
    code, out, err = verbs(verb, "x.pt", "--out", f"new/folder/{name}")
    assert (code, out, err) == (1, "", f"nanhunt: wrote new/folder/{name}\n")
    text = (tmp_path / "new" / "folder" / name).read_text()
    assert text.startswith(begins)
    assert text.endswith("\n")


def test_format_goes_before_the_name_of_the_file(verbs, tmp_path):
    verbs("replay", "x.pt", "--out", "r.json", "--format", "console")
    assert (tmp_path / "r.json").read_text() == console.render(report("error"))
    verbs("replay", "x.pt", "--out", "r.txt", "--json")
    assert json.loads((tmp_path / "r.txt").read_text())["title"] == "a run"


@each_verb
def test_file_that_is_there_is_replaced_or_left_as_it_was(verbs, tmp_path, monkeypatch, verb):
    (tmp_path / "r.txt").write_text("old " * 10_000)
    assert verbs(verb, "x.pt", "--out", "r.txt")[0] == 1
    whole = (tmp_path / "r.txt").read_text()
    assert "old" not in whole

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    code, out, err = verbs(verb, "x.pt", "--out", "r.txt")
    assert (code, out, err) == (2, "", "nanhunt: cannot write r.txt: No space left on device\n")
    assert (tmp_path / "r.txt").read_text() == whole
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []


@each_verb
def test_folder_in_place_of_a_file_is_refused_before_the_work(verbs, tmp_path, verb):
    (tmp_path / "debug").mkdir()
    code, out, err = verbs(verb, "x.pt", "--out", "debug")
    assert (code, out, verbs.num_runs) == (2, "", 0)
    assert err == "nanhunt: cannot write debug: it is a folder\n  help: name a file in it\n"


def test_file_below_a_file_is_refused(verbs):
    code, out, err = verbs("replay", "x.pt", "--out", "my_forms.py/r.txt")
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: cannot write my_forms.py/r.txt: ")
    assert err.count("\n") == 1


def test_standard_output_may_be_named_as_a_file(tmp_path):
    lines = [
        "import sys",
        "from pathlib import Path",
        "from verbs import report",
        "from nanhunt.cli.output import deliver",
        "deliver(report('error'), out=Path('/dev/stdout'), form='json')",
    ]
    with (tmp_path / "all.json").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        )
    assert (done.returncode, done.stderr) == (0, "nanhunt: wrote /dev/stdout\n")
    assert json.loads((tmp_path / "all.json").read_text())["title"] == "a run"


def test_names_from_outside_do_not_keep_a_report_from_being_written(verbs, tmp_path):
    location = Location("weights", tensor="\udcff\x1b[31m[bold]")
    found = Finding("NH701", "x", "error", "observed", "x", "\ud800 is so", location)
    verbs.find(Report("replay of \udcff.pt", (), (found,), (), Verdict("observed", ())))
    for name in REPORTS:
        assert verbs("replay", "x.pt", "--format", name, "--out", f"r.{name}")[0] == 1
        assert "\x1b" not in (tmp_path / f"r.{name}").read_text(encoding="utf-8")
        assert verbs("replay", "x.pt", "--format", name)[0] == 1


# Ignoring


@each_verb
def test_ignored_finding_is_shown_as_not_done_with_the_reason(verbs, verb):
    code, out, err = verbs(verb, "x.pt", "--ignore", "NH304=the schedule ends at 0", "--ignore", "nh303=we know")
    assert (code, err) == (0, "")
    assert "[NH30" not in out
    words = " ".join(out.split())
    assert "what was found is ignored; see what was not done" in words
    assert "- NH304 lost-update head.weight: ignored: the schedule ends at 0" in words
    assert "- NH303 infinite-second-moment head.weight: ignored: we know" in words


@each_verb
def test_project_says_what_is_ignored_and_the_command_line_goes_before_it(verbs, tmp_path, verb):
    (tmp_path / "pyproject.toml").write_text('[tool.nanhunt]\nignore = {NH304 = "theirs", NH303 = "theirs"}\n')
    data = json.loads(verbs(verb, "x.pt", "--json", "--ignore", "NH304=mine")[1])
    reasons = {skip["what"].split()[0]: skip["reason"] for skip in data["skips"]}
    assert data["findings"] == []
    assert reasons == {"NH304": "ignored: mine", "NH303": "ignored: theirs"}
