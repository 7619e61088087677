"""The program as a user runs it: errors of one line, exit codes, help, and the list of verbs and options."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint

import edfio
import numpy as np
import pytest
import torch
import typer
from torch import nn

from detector.recording import CHANNELS
from nanhunt.capture.format import Capture, write_capture
from nanhunt.cli import app as program

REPORTED = ["--json", "--format", "--out", "--fail-on", "--git-bisect", "--ignore"]
AUDITED = ["file", "--target", "--config", "--seed", *REPORTED]
VERBS = {
    "run": [
        "script",
        "-m",
        "--exact",
        "--on-fault",
        "--out",
        "--max-captures",
        "--report",
        "--json",
        "--format",
        "--fail",
        "--fail-on",
        "--git-bisect",
        "--ignore",
    ],
    "replay": ["file", "--checkpoint", "--target", "--seeds", *REPORTED],
    "audit": AUDITED,
    "audit-optimizer": AUDITED,
    "audit-dtype": AUDITED,
    "audit-init": AUDITED,
    "audit-data": AUDITED,
    "rules": ["--json"],
    "explain": ["code", "--json"],
    "train": [
        "--preset",
        "--steps",
        "--trace-finite",
        "--data",
        "--seed",
        "--batch-size",
        "--out",
        "--on-fault",
        "--save",
        "--threads",
    ],
}

TINY = """
import torch
from torch import nn

class Tiny:
    max_grad_norm = 1.0

    def build(self, seed):
        return nn.Linear(3, 1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(self, model, batch):
        return model(batch["windows"]).mean()

tiny = Tiny()

def wrong():
    return 5
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, and the program run as if from its command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("NANHUNT_DEBUG", raising=False)
    yield tmp_path
    sys.modules.pop("tiny_target", None)


@pytest.fixture
def nanhunt(here, monkeypatch, capsys):
    """Runs the program; gives exit code, standard output and standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *map(str, args)])
        code = 0
        try:
            program.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(here, nanhunt):
    """Runs what must be refused: exit code 2, one line and at most a help line on stderr, nothing else anywhere."""

    def run(*args):
        before = sorted(here.rglob("*"))
        code, out, err = nanhunt(*args)
        assert code == 2
        assert out == ""
        lines = err.splitlines()
        assert err.endswith("\n")
        assert 1 <= len(lines) <= 2
        assert re.fullmatch(r"nanhunt: \S.*", lines[0])
        assert not lines[0].endswith(".")
        assert all(re.fullmatch(r"  help: \S.*", line) for line in lines[1:])
        left = [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts]
        assert left == before, "something was written"
        return lines

    return run


def legacy(path, shape=(2, 3)):
    torch.save({"windows": torch.ones(shape), "labels": torch.zeros(shape[0]), "global_step": 19}, path)
    return path


# Captures and checkpoints


def test_a_missing_file(refusal):
    assert refusal("replay", "none.pt") == ["nanhunt: no such file: none.pt"]


def test_a_truncated_capture(here, refusal):
    whole = write_capture(Capture({"step": 19}, {"batches": [torch.ones(64)]}), here).read_bytes()
    (here / "cut.pt").write_bytes(whole[:-200])
    line, help_line = refusal("replay", "cut.pt")
    assert line.startswith("nanhunt: cut.pt is truncated or damaged")
    assert help_line == "  help: copy it again from where it was written"


def test_what_is_no_capture(here, refusal):
    (here / "notes.pt").write_text("step 19 went wrong\n")
    torch.save({"epoch": 3}, here / "other.pt")
    assert refusal("replay", "notes.pt")[0] == "nanhunt: notes.pt is not an archive written by torch.save"
    assert refusal("replay", "other.pt")[0] == "nanhunt: other.pt is not a capture: it holds epoch"
    assert refusal("replay", ".")[0] == "nanhunt: . is a folder"


class Runs:
    def __reduce__(self):
        return os.system, ("touch witness",)


def test_a_pickle_with_code_is_refused_and_not_run(here, refusal):
    torch.save({"windows": Runs(), "labels": 1}, here / "evil.pt")
    legacy(here / "good.pt")
    for args in (["evil.pt"], ["good.pt", "--target", "detector.small", "--checkpoint", "evil.pt"]):
        line, _ = refusal("replay", *args)
        assert line.startswith("nanhunt: evil.pt holds code or objects")
    assert not (here / "witness").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "nanhunt: no target 'nothing'"),
        ("no_such_module:x", "nanhunt: target 'no_such_module:x': cannot import no_such_module"),
        ("tiny_target:absent", "nanhunt: target 'tiny_target:absent': tiny_target has no attribute absent"),
        ("tiny_target:Tiny", "nanhunt: target tiny_target:Tiny cannot be built: TypeError"),
        ("tiny_target:wrong", "nanhunt: target tiny_target:wrong has no loss(model, batch)"),
    ],
)
def test_a_wrong_target(here, refusal, spec, said):
    (here / "tiny_target.py").write_text(TINY)
    legacy(here / "x.pt")
    assert refusal("replay", "x.pt", "--target", spec)[0].startswith(said)


def test_a_capture_of_a_target_that_is_not_installed(here, refusal):
    path = write_capture(Capture({"step": 19, "target": {"name": "os:system"}}, {"batches": [torch.ones(1)]}), here)
    line, help_line = refusal("replay", path)
    assert line == "nanhunt: the capture was made with the target 'os:system', which is not installed"
    assert help_line == "  help: give --target"


def test_a_batch_whose_shape_does_not_fit(here, refusal):
    legacy(here / "x.pt", (2, 5))
    (here / "tiny_target.py").write_text(TINY)
    line, _ = refusal("replay", "x.pt", "--target", "tiny_target:tiny")
    assert line.startswith("nanhunt: the captured batch does not fit target tiny_target:tiny: ")


def test_a_batch_that_the_model_itself_refuses(here, refusal):
    legacy(here / "x.pt", (2, 5, 2560))
    line, _ = refusal("replay", "x.pt", "--target", "detector.small")
    assert line.startswith("nanhunt: the captured batch does not fit target detector.small: ")


def test_a_checkpoint_of_another_model_says_which_keys(here, refusal):
    legacy(here / "x.pt")
    (here / "tiny_target.py").write_text(TINY)
    torch.save(nn.Sequential(nn.Linear(3, 1)).state_dict(), here / "last.pt")
    line, _ = refusal("replay", "x.pt", "--target", "tiny_target:tiny", "--checkpoint", "last.pt")
    assert line == (
        "nanhunt: the checkpoint is of another model than target tiny_target:tiny: "
        "missing bias, weight; unexpected 0.bias, 0.weight"
    )
    torch.save(nn.Linear(4, 1).state_dict(), here / "last.pt")
    line, _ = refusal("replay", "x.pt", "--target", "tiny_target:tiny", "--checkpoint", "last.pt")
    assert line.endswith("weight is (1, 4) there, (1, 3) in the model")
    torch.save({"epoch": 3}, here / "last.pt")
    line, _ = refusal("replay", "x.pt", "--target", "tiny_target:tiny", "--checkpoint", "last.pt")
    assert line == "nanhunt: last.pt holds no model weights"
    line, _ = refusal("replay", "x.pt", "--target", "tiny_target:tiny", "--checkpoint", "none.pt"), None
    assert line == ["nanhunt: no such file: none.pt"]


# Recordings and settings


def edf(path, labels):
    samples = 50 * np.sin(np.arange(256 * 12) / 5)
    signals = [
        edfio.EdfSignal(samples + n, 256, label=label, physical_dimension="uV", physical_range=(-500, 500))
        for n, label in enumerate(labels)
    ]
    edfio.Edf(signals, data_record_duration=1.0).write(path)
    return path


def test_an_unreadable_recording(here, refusal):
    (here / "night.edf").write_text("not a recording")
    line = refusal("train", "--preset", "small", "--data", "night.edf")[0]
    assert line.startswith("nanhunt: night.edf is not an EDF file")
    assert refusal("train", "--preset", "small", "--data", "none.edf")[0].startswith("nanhunt: cannot read none.edf")
    raw = edf(here / "cut.edf", CHANNELS).read_bytes()
    (here / "cut.edf").write_bytes(raw[:-1000])
    line, help_line = refusal("train", "--preset", "small", "--data", "cut.edf")
    assert "cut.edf holds 11.8" in line
    assert help_line == "  help: the file is truncated or damaged; copy it again"


def test_a_recording_that_lacks_channels_says_which(here, refusal):
    edf(here / "night.edf", [name for name in CHANNELS if name not in ("Fz", "O2")])
    line, help_line = refusal("train", "--preset", "small", "--data", "night.edf")
    assert line == "nanhunt: night.edf lacks 2 of 19 electrodes: Fz O2"
    assert help_line.startswith("  help: referential channels with 10-20 names are needed")


def test_one_bad_recording_among_good_ones_is_enough(here, refusal):
    edf(here / "good.edf", CHANNELS)
    (here / "bad.edf").write_text("")
    line = refusal("train", "--preset", "small", "--data", "good.edf", "--data", "bad.edf")[0]
    assert line.startswith("nanhunt: bad.edf is not an EDF file: 0 bytes")


def test_unknown_settings_and_rules(refusal):
    lines = refusal("train", "--preset", "large")
    assert lines == ["nanhunt: no preset 'large'", "  help: one of: v3, incident, small, small-incident"]
    assert refusal("train", "--on-fault", "stop") == ["nanhunt: --on-fault is raise, skip or record, not 'stop'"]
    assert refusal("explain", "NH999") == ["nanhunt: no rule 'NH999'", "  help: `nanhunt rules` lists them"]


def test_names_from_outside_cannot_break_the_line_or_colour_it(refusal):
    name = "a\nb\x1b[31m[bold]:warning:[/x].pt"
    assert refusal("replay", name) == ["nanhunt: no such file: a b\N{REPLACEMENT CHARACTER}[31m[bold]:warning:[/x].pt"]


def test_with_nanhunt_debug_the_error_itself_is_raised(nanhunt, monkeypatch):
    monkeypatch.setenv("NANHUNT_DEBUG", "1")
    with pytest.raises(program.NanhuntError, match="no such file"):
        nanhunt("replay", "none.pt")


@pytest.mark.parametrize("args", [["replay"], ["replay", "x.pt", "--frobnicate"], ["mend"], ["train", "--steps", "0"]])
def test_wrong_use_is_exit_code_2(nanhunt, args):
    code, out, err = nanhunt(*args)
    assert code == 2
    assert out == ""
    assert "Usage: nanhunt" in err


# What is not refused


def test_the_exit_code_says_whether_a_fault_was_found(here, nanhunt):
    (here / "tiny_target.py").write_text(TINY)
    legacy(here / "good.pt")
    torch.save({"windows": torch.tensor([[1.0, float("nan"), 0.0]]), "labels": torch.ones(1)}, here / "bad.pt")
    before = sorted(path for path in here.iterdir())
    code, out, err = nanhunt("replay", "good.pt", "--target", "tiny_target:tiny", "--seeds", "0")
    assert (code, err) == (0, "")
    assert "no operation was found" in out
    code, out, err = nanhunt("replay", "bad.pt", "--target", "tiny_target:tiny", "--seeds", "1")
    assert (code, err) == (1, "")
    assert "error[NH601]: batch.windows holds 1 NaN among 3 elements" in out
    assert all(len(line) <= 100 and line == line.rstrip() for line in out.splitlines())
    code, out, err = nanhunt("replay", "bad.pt", "--target", "tiny_target:tiny", "--seeds", "1", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out, parse_constant=pytest.fail)["findings"][0]["code"] == "NH601"
    assert sorted(path for path in here.iterdir() if path.name != "__pycache__") == before


def test_rules_are_listed_and_explained(nanhunt):
    code, out, _ = nanhunt("rules")
    assert code == 0
    assert "NH203  eigenvector-gradient-at-tie" in out
    for line in out.splitlines():
        code, page, err = nanhunt("explain", line.split()[0])
        assert (code, err) == (0, "")
        assert page.startswith(f"{line.split()[0]} {line.split()[1]}: ")


def test_the_verbs_and_options_are_these():
    commands = typer.main.get_command(program.app).commands
    assert {name: [word for p in verb.params for word in p.opts] for name, verb in commands.items()} == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(nanhunt, verb):
    code, out, err = nanhunt(verb, "--help")
    assert (code, err) == (0, "")
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", out).split())
    command = typer.main.get_command(program.app).commands[verb]
    examples = [
        line.removeprefix("Example:").strip() for line in command.help.splitlines() if f"nanhunt {verb}" in line
    ]
    assert examples
    for example in examples:
        assert example in shown
        command.make_context(verb, shlex.split(example.partition(" > ")[0])[2:])


def test_the_program_itself_lists_its_verbs(nanhunt):
    code, out, err = nanhunt("--help")
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)


def test_a_verb_that_cannot_be_loaded_leaves_the_others_alone():
    verb = program._load(EntryPoint("mend", "absent_package.cli:mend", program.GROUP))
    with pytest.raises(program.NanhuntError) as caught:
        verb()
    assert str(caught.value) == (
        "the verb 'mend' (absent_package.cli:mend) cannot be loaded: "
        "ModuleNotFoundError: No module named 'absent_package'"
    )


def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "nanhunt.cli.app", "rules"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.stderr == ""
    # What a shell reports of any program whose reader has gone; 0 and 1 would say something of a fault.
    assert done.returncode == 128 + signal.SIGPIPE
