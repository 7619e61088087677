"""Exit codes: 0 nothing at or above ``--fail-on``, 1 something, 2 nanhunt or its use failed, 125 for ``git bisect``."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from verbs import FOUND, GIVING, Verbs, report

from nanhunt.records.steps import StepOutcome

CODES = {
    ("clean", "error"): 0,
    ("clean", "warning"): 0,
    ("clean", "never"): 0,
    ("warning", "error"): 0,
    ("warning", "warning"): 1,
    ("warning", "never"): 0,
    ("error", "error"): 1,
    ("error", "warning"): 1,
    ("error", "never"): 0,
}
DEFAULTS = dict.fromkeys(GIVING, "warning") | {"replay": "error"}

each_verb = pytest.mark.parametrize("verb", GIVING)


@pytest.fixture
def verbs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NANHUNT_DEBUG", raising=False)
    return Verbs(monkeypatch, capsys)


# What was found


@each_verb
@pytest.mark.parametrize("bisect", [[], ["--git-bisect"]])
@pytest.mark.parametrize("what", FOUND)
def test_exit_code_says_what_was_found(verbs, verb, what, bisect):
    verbs.find(report(what))
    for fail_on in ("error", "warning", "never"):
        code, out, err = verbs(verb, "x.pt", "--fail-on", fail_on, *bisect)
        assert (code, err) == (CODES[what, fail_on], "")
        assert out.startswith(("a run\n", "audit of x.pt\n"))
    assert verbs(verb, "x.pt", *bisect)[0] == CODES[what, DEFAULTS[verb]]


@each_verb
def test_ignored_finding_does_not_count(verbs, verb):
    verbs.find(report("error"))
    assert verbs(verb, "x.pt", "--ignore", "NH303=known", "--fail-on", "error")[0] == 0
    assert verbs(verb, "x.pt", "--ignore", "NH303=known", "--fail-on", "warning")[0] == 1
    assert verbs(verb, "x.pt", "--ignore", "NH3=known", "--fail-on", "warning")[0] == 0


@pytest.mark.parametrize("bisect", [[], ["--git-bisect"]])
def test_step_that_is_not_finite_is_a_fault_though_no_rule_has_a_name_for_it(verbs, bisect):
    unexplained = replace(report(), baseline=StepOutcome(loss=float("nan"), failed_phase="forward"))
    verbs.find(unexplained)
    assert verbs("replay", "x.pt", *bisect)[0] == 1
    assert verbs("replay", "x.pt", "--fail-on", "warning", *bisect)[0] == 1
    assert verbs("replay", "x.pt", "--fail-on", "never", *bisect)[0] == 0


def test_replay_that_was_interrupted_is_no_clean_bill(verbs):
    verbs.find(replace(report(), baseline=None))
    assert verbs("replay", "x.pt")[0] == 130
    assert verbs("replay", "x.pt", "--git-bisect")[0] == 130


# Wrong use

WRONG = [
    ["--frobnicate"],
    ["--fail-on", "sometimes"],
    ["--format", "pdf"],
    ["--format", "absent_module:render"],
    ["--ignore", "NH303"],
    ["--ignore", "NH999=x"],
    ["--out", "."],
    ["x.pt", "y.pt"],
]


@each_verb
@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_wrong_use_is_2_and_nothing_is_done(verbs, verb, options):
    code, out, err = verbs(verb, "x.pt", *options)
    assert (code, out, verbs.num_runs) == (2, "", 0)
    assert err.startswith(("nanhunt: ", "Usage: nanhunt"))
    assert "Traceback" not in err
    assert verbs(verb, "x.pt", *options, "--git-bisect")[0] == 125
    assert verbs(verb, "--git-bisect", *options, "x.pt")[0] == 125


@pytest.mark.parametrize("args", [["replay"], ["mend"], ["explain"], ["explain", "NH999"], ["rules", "--frobnicate"]])
def test_wrong_use_of_other_verbs_is_2(verbs, args):
    assert verbs(*args)[0] == 2
    assert verbs(*args, "--git-bisect")[0] == 125


@each_verb
@pytest.mark.parametrize(
    "table", ["ignore = 3", "ignores = {}", "ignore = {NH999 = 'x'}", "ignore = {NH304 = ''}", "["]
)
def test_wrong_project_file_is_2_and_nothing_is_done(verbs, tmp_path, verb, table):
    (tmp_path / "pyproject.toml").write_text(f"[tool.nanhunt]\n{table}\n")
    code, out, err = verbs(verb, "x.pt")
    assert (code, out, verbs.num_runs) == (2, "", 0)
    assert err.startswith("nanhunt: ")
    assert 1 <= err.count("\n") <= 2
    assert verbs(verb, "x.pt", "--git-bisect")[0] == 125


def test_git_bisect_among_the_words_of_a_script_is_the_script_s(verbs, tmp_path):
    (tmp_path / "train.py").write_text("import sys\nsys.exit(2)\n")
    assert verbs("run", "train.py", "--git-bisect")[0] == 2


# Files that cannot be read, by the verbs as they are


@pytest.fixture
def real(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "notes.pt").write_text("not a capture\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()

    class Real(Verbs):
        def find(self, given):
            pass

    return Real(monkeypatch, capsys)


@each_verb
@pytest.mark.parametrize("file", ["none.pt", "notes.pt", "empty.pt", "folder.pt"])
def test_file_that_cannot_be_read_is_2(real, verb, file):
    code, out, err = real(verb, file)
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: ")
    assert file in err.splitlines()[0]
    assert err.count("\n") <= 2
    assert real(verb, file, "--git-bisect")[0] == 125
    assert real(verb, file, "--fail-on", "never")[0] == 2


@each_verb
def test_target_that_is_not_there_is_2(real, verb):
    code, out, err = real(verb, *(["notes.pt"] if verb == "replay" else []), "--target", "absent_module:target")
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: ")


# nanhunt run


LOOP = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Linear(8, 8).to({dtype})
opt = torch.optim.SGD(net.parameters(), lr={lr})
for step in range(8):
    opt.zero_grad()
    x = torch.ones(4, 8, dtype={dtype}) * ({bad} if step == 2 else 1)
    net(x).square().mean().backward()
    opt.step()
"""
CLEAN = LOOP.format(dtype="torch.float32", lr=0.01, bad=1)
LOST = LOOP.format(dtype="torch.bfloat16", lr=1e-9, bad=1)
FAULT = LOOP.format(dtype="torch.float32", lr=0.01, bad="float('inf')")
SCRIPTS = {"clean": CLEAN, "warning": LOST, "error": FAULT}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Writes the script and runs it; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("RANK", "WORLD_SIZE", "NANHUNT_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    class Script(Verbs):
        def find(self, given):
            pass

        def __call__(self, text, *options):
            (tmp_path / "train.py").write_text(text)
            return super().__call__("run", *options, "train.py")

    return Script(monkeypatch, capsys)


@pytest.mark.parametrize("bisect", [[], ["--git-bisect"]])
@pytest.mark.parametrize("what", SCRIPTS)
def test_exit_code_of_a_traced_script_says_what_was_found(run, what, bisect):
    for fail_on in ("error", "warning", "never"):
        assert run(SCRIPTS[what], "--exact", "--fail-on", fail_on, *bisect)[0] == CODES[what, fail_on]
    assert run(SCRIPTS[what], "--exact", *bisect)[0] == CODES[what, "error"]
    assert run(SCRIPTS[what], "--exact", "--no-fail", "--fail-on", "warning", *bisect)[0] == 0


@pytest.mark.filterwarnings("ignore:nanhunt:RuntimeWarning")
def test_exit_code_of_a_watched_script_says_what_was_found(run):
    assert run(CLEAN)[0] == 0
    assert run(FAULT)[0] == 1
    assert run(FAULT, "--on-fault", "record")[0] == 1
    assert run(FAULT, "--on-fault", "record", "--fail-on", "never")[0] == 0


def test_script_that_fails_by_itself_has_its_own_exit_code_but_for_git_bisect(run):
    for text, code in (("import sys\nsys.exit(2)\n", 2), ("import sys\nsys.exit(7)\n", 7), ("1 / 0\n", 1)):
        assert run(text)[0] == code
        assert run(text, "--exact")[0] == code
        assert run(text, "--git-bisect")[0] == 125
        assert run(text, "--exact", "--git-bisect")[0] == 125


def test_script_that_does_not_train_cannot_be_tested(run):
    assert run("print('nothing to see')\n")[0] == 0
    assert run("print('nothing to see')\n", "--git-bisect")[0] == 125
    assert run("print('nothing to see')\n", "--exact", "--git-bisect")[0] == 125


def test_fault_in_a_script_that_fails_too_is_a_fault(run):
    assert run(f"{FAULT}\nimport sys\nsys.exit(7)\n", "--exact", "--git-bisect")[0] == 1


def test_ctrl_c_ends_a_bisection(run):
    assert run("raise KeyboardInterrupt\n", "--git-bisect")[0] == 130


@pytest.mark.parametrize(
    "options",
    [
        ["--on-fault", "stop"],
        ["--exact", "--out", "x"],
        ["--format", "pdf"],
        ["--ignore", "NH304"],
        ["--report", "."],
        ["--json", "."],
    ],
    ids=" ".join,
)
def test_wrong_use_of_run_is_2_before_the_script_begins(run, options):
    text = "open('witness', 'w').close()\n"
    code, out, err = run(text, *options)
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: ")
    assert not Path("witness").exists()
    assert run(text, "--git-bisect", *options)[0] == 125


def test_json_and_exit_code_agree(verbs):
    verbs.find(report("error"))
    code, out, _ = verbs("audit-dtype", "x.pt", "--json", "--ignore", "NH303=known")
    assert code == 1
    assert [found["severity"] for found in json.loads(out)["findings"]] == ["warning"]
