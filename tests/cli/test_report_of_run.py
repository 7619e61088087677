"""Where the report of ``nanhunt run`` goes: standard error, for standard output is the script's, and files."""

import json
import sys

import pytest

from nanhunt.cli import app as program

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Linear(8, 8).to(torch.bfloat16)
opt = torch.optim.SGD(net.parameters(), lr=1e-9)
for step in range(8):
    opt.zero_grad()
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    loss = net(x).square().mean()
    if step == 6 and {is_bad}:
        loss = loss * torch.zeros(()).log()
    loss.backward()
    opt.step()
print("done")
"""
BAD, GOOD = SCRIPT.format(is_bad=True), SCRIPT.format(is_bad=False)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Writes the script and traces it; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("RANK", "WORLD_SIZE", "NANHUNT_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run_it(text, *options, is_exact=True):
        (tmp_path / "train.py").write_text(text)
        exact = ["--exact"] if is_exact else []
        monkeypatch.setattr(sys, "argv", ["nanhunt", "run", *exact, *map(str, options), "train.py"])
        with pytest.raises(SystemExit) as ended:
            program.main()
        return ended.value.code, *capsys.readouterr()

    yield run_it
    sys.modules.pop("my_forms", None)


def codes(text):
    return [(finding["code"], finding["severity"]) for finding in json.loads(text)["findings"]]


FOUND = [("NH501", "error")]


def test_report_is_written_to_a_file_and_shown_as_well(run, tmp_path):
    code, out, err = run(BAD, "--report", "r/fault.json")
    assert (code, out) == (1, "done\n")
    assert "error[NH501]: " in err
    assert codes((tmp_path / "r" / "fault.json").read_text()) == FOUND
    run(BAD, "--report", "fault.txt")
    assert (tmp_path / "fault.txt").read_text().startswith("train.py\n")
    run(BAD, "--report", "fault.txt", "--format", "json")
    assert codes((tmp_path / "fault.txt").read_text()) == FOUND


def test_json_and_report_are_both_written(run, tmp_path):
    run(BAD, "--json", "a.json", "--report", "b.txt")
    assert codes((tmp_path / "a.json").read_text()) == FOUND
    assert "error[NH501]: " in (tmp_path / "b.txt").read_text()


def test_report_says_too_that_nothing_was_found(run, tmp_path):
    code, out, err = run(GOOD.replace("1e-9", "1e-2"), "--report", "r.json")
    assert (code, out, err) == (0, "done\n", "")
    assert codes((tmp_path / "r.json").read_text()) == []


def test_format_without_a_file_is_what_is_shown_whatever_was_found(run, tmp_path):
    for text, found in ((BAD, FOUND), (GOOD.replace("1e-9", "1e-2"), [])):
        code, out, err = run(text, "--format", "json")
        assert (code, out) == (int(bool(found)), "done\n")
        assert codes(err) == found
    (tmp_path / "my_forms.py").write_text("def short(report):\n    return str(len(report.findings))\n")
    assert run(BAD, "--format", "my_forms:short") == (1, "done\n", "1\n")


def test_ignored_warning_is_said_and_not_counted(run, tmp_path):
    code, _, err = run(GOOD, "--fail-on", "warning")
    assert code == 1
    assert "warning[NH304]" in err
    code, out, err = run(GOOD, "--fail-on", "warning", "--ignore", "NH304=a frozen run", "--report", "r.json")
    assert (code, out) == (0, "done\n")
    assert err == "nanhunt: NH304 lost-update: ignored: a frozen run\n"
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["findings"] == []
    assert {"what": "NH304 lost-update", "reason": "ignored: a frozen run"} in data["skips"]


def test_project_of_the_working_folder_says_what_is_ignored(run, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.nanhunt]\nignore = {NH3 = "a frozen run"}\n')
    code, _, err = run(GOOD, "--fail-on", "warning")
    assert (code, err) == (0, "nanhunt: NH304 lost-update: ignored: a frozen run\n")


def test_script_that_was_stopped_does_not_end_well_though_the_finding_is_ignored(run):
    code, out, err = run(BAD, "--ignore", "NH101=x", is_exact=False)
    assert (code, out) == (1, "")
    assert "NonFiniteStep: step 6 is non-finite" in err
    assert "nanhunt: NH101 non-finite-activation: ignored: x\n" in err


def test_loss_that_is_not_finite_is_a_fault_of_the_forward_pass_though_every_module_s_output_is_finite(run, tmp_path):
    code, *_ = run(BAD, "--json", "r.json", is_exact=False)
    [found] = json.loads((tmp_path / "r.json").read_text())["findings"]
    assert (code, found["code"], found["location"]["phase"], found["location"]["step"]) == (1, "NH101", "forward", 6)
    assert found["message"].startswith("step 6 is non-finite: loss -inf")


def test_file_that_is_there_is_replaced_or_left_as_it_was(run, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text("old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        code, out, err = run(GOOD, "--json", "r.json")
    assert (code, out) == (2, "done\n")
    assert err.endswith("nanhunt: cannot write r.json: No space left on device\n")
    assert (tmp_path / "r.json").read_text() == "old"
    assert run(GOOD, "--json", "r.json")[0] == 0
    assert codes((tmp_path / "r.json").read_text()) == [("NH304", "warning")]


def test_each_process_writes_a_file_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(GOOD, "--report", "r.txt", "--json", "r.json")
    assert sorted(path.name for path in tmp_path.glob("r.*")) == ["r.rank1.json", "r.rank1.txt"]
