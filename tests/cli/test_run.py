"""``nanhunt run``: an unmodified script runs as under python, and its first non-finite step is reported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanhunt.cli import app as program

MODEL = """
import sys
import torch
from torch import nn

class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)

class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt(x)

class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        self.last = nn.Sequential(nn.Identity(), last)

    def forward(self, x):
        return self.last(self.fc(x).square()).sum()
"""

LOOP = """
torch.manual_seed(0)
net = Net({last}())
opt = torch.optim.SGD(net.parameters(), lr=0.0)
for step in range(5):
    x = torch.ones(3, 2)
    if step == {bad}:
        x[1] = 0
    opt.zero_grad()
    net(x).backward()
    opt.step()
print("done")
"""


def training(last: str = "Log", bad: int = -1) -> str:
    return MODEL + LOOP.format(last=last, bad=bad)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder; what a script changes in the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("RANK", "WORLD_SIZE", "NANHUNT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Writes the script, if there is a text, and runs it; gives exit code, standard output and standard error."""

    def run_it(text, *options, args=(), name="train.py"):
        if text is not None:
            (here / name).write_text(text)
        sys.argv[:] = ["nanhunt", "run", *map(str, options), *([name] if name else []), *args]
        with pytest.raises(SystemExit) as ended:
            program.main()
        return ended.value.code, *capsys.readouterr()

    return run_it


def python(here: Path, *args: str) -> tuple[int, str, str]:
    """What python itself makes of it."""
    done = subprocess.run([sys.executable, *args], cwd=here, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# As under python


@pytest.mark.parametrize("mode", [[], ["--exact"]])
def test_healthy_script_ends_as_under_python_and_nothing_is_said(here, run, mode):
    assert run(training(), *mode) == (0, "done\n", "")
    assert [path.name for path in here.iterdir()] == ["train.py"]


IDENTITY = """
import sys, os
print(__name__, __file__, __package__, __spec__, __doc__, sys.argv, sys.path[0])
print(sys.modules["__main__"].__dict__ is globals())
"""


@pytest.mark.parametrize("args", [(), ("--help", "-x", "--exact", "a b", "--", "-m")])
def test_script_sees_itself_as_under_python(here, run, args):
    (here / "below").mkdir()
    (here / "below" / "train.py").write_text('"""Trains."""' + IDENTITY)
    expected = python(here, "below/train.py", *args)
    code, out, _ = run(None, name="below/train.py", args=args)
    assert (code, out) == expected[:2]


def test_module_sees_itself_as_under_python(here, run):
    package = here / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = IDENTITY.replace("__spec__", "__spec__.name")
    (package / "train.py").write_text("from . import other\n" + text)
    (package / "__main__.py").write_text(text)
    (package / "other.py").write_text("")
    for name in ("package.train", "package"):
        expected = python(here, "-m", name, "--lr", "1")
        code, out, _ = run(None, "-m", name=name, args=("--lr", "1"))
        assert (code, out) == expected[:2]
        assert expected[0] == 0


def test_folder_with_a_main_file_runs(here, run):
    (here / "tool").mkdir()
    (here / "tool" / "helper.py").write_text("x = 5")
    (here / "tool" / "__main__.py").write_text("import helper, sys\nprint(helper.x, sys.argv)")
    assert run(None, name="tool")[:2] == python(here, "tool")[:2] == (0, "5 ['tool']\n")


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    raise ValueError('wrong')\n\nf()\n",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError(3) from error\n",
        "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])\n",
        "import absent_module\n",
        "print('x'\n",
        "import sys\nsys.exit(3)\n",
        "import sys\nsys.exit('no data')\n",
        "import sys\nsys.exit()\n",
        "raise SystemExit(300)\n",
        "import sys\nsys.excepthook = lambda *all: print('own hook', all[0].__name__)\nraise OSError\n",
        "import sys\nprint(sys.stdin.read())\n",
    ],
)
def test_ending_is_that_of_python(here, text):
    (here / "train.py").write_text(text)
    results = []
    for command in ([sys.executable, "train.py"], [sys.executable, "-m", "nanhunt", "run", "train.py"]):
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, input="typed")
        errors = [line for line in done.stderr.splitlines() if not line.startswith("nanhunt: not done:")]
        results.append((done.returncode, done.stdout, errors))
    assert results[0] == results[1]


def test_error_in_the_loop_is_shown_without_our_frames(here, run):
    text = MODEL + (
        "class Stop(nn.Module):\n    def forward(self, x):\n        raise ValueError('stop')\n"
        "net = Net(Stop())\ntorch.optim.SGD(net.parameters(), lr=0.1)\nnet(torch.ones(1, 2))\n"
    )
    (here / "train.py").write_text(text)
    expected = python(here, "train.py")
    for mode in ([], ["--exact"]):
        code, out, err = run(text, *mode)
        assert (code, out) == (1, "")
        assert err == expected[2]


# Faults


def test_forward_fault_stops_the_script_and_names_step_and_module(here, run):
    code, out, err = run(training("Log", bad=3), args=["--lr", "0.1"])
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert "error[NH101]: step 3 is non-finite: loss -inf, 1 of 1 gradients non-finite" in err
    assert "  --> forward, step 3\n  --> last.1\n" in err
    assert "first non-finite output: last.1" in err
    assert "nanhunt run --exact train.py --lr 0.1\n" in err
    assert "nanhunt replay debug/bad_batch_000003.pt --target mymodel:target\n" in err
    assert (here / "debug" / "bad_batch_000003.pt").is_file()


def test_backward_fault_names_step_and_module(run):
    code, _, err = run(training("Root", bad=2))
    assert code == 1
    assert "error[NH201]: step 2 is non-finite: loss " in err
    assert "(finite), 1 of 1 gradients non-finite" in err
    assert "  --> backward, step 2\n  --> last.1\n" in err


@pytest.mark.parametrize(
    ("last", "op", "phase", "line"), [("Log", "log", "forward", 8), ("Root", "sqrt", "backward", 12)]
)
def test_exact_run_names_operation_module_and_line(run, last, op, phase, line):
    code, out, err = run(training(last, bad=3), "--exact", "--json", "report.json")
    assert (code, out) == (1, "done\n")
    report = json.loads(Path("report.json").read_text())
    assert report["title"] == "train.py"
    where = report["findings"][0]["location"]
    assert (where["phase"], where["module"], where["step"]) == (phase, "last.1", 3)
    assert f"aten::{op}" in (where["op"], where["forward_op"])
    assert (Path(where["source"]["file"]).name, where["source"]["line"]) == ("train.py", line)
    assert f"  --> train.py:{line}\n" in err


@pytest.mark.parametrize("action", ["skip", "record"])
def test_script_goes_on_after_a_fault_if_asked_to(here, run, action):
    with pytest.warns(RuntimeWarning) as warned:
        code, out, err = run(training("Log", bad=1), "--on-fault", action, "--out", "kept")
    assert str(warned[0].message).startswith("nanhunt: step 1 is non-finite")
    assert (code, out) == (1, "done\n")
    assert "step 1 is non-finite" in err
    assert (here / "kept" / "bad_batch_000001.pt").is_file()


def test_every_fault_is_counted_and_the_first_is_shown(run):
    text = training("Log").replace("step == -1", "step > 1")
    with pytest.warns(RuntimeWarning):
        _, _, err = run(text, "--on-fault", "skip", "--max-captures", "1")
    assert err.count("error[") == 1
    assert "error[NH101]: step 2 is" in err
    assert "non-finite steps  2, 3, 4\n" in err
    assert len(list(Path("debug").iterdir())) == 1


@pytest.mark.parametrize("mode", [[], ["--exact"]])
def test_no_fail_leaves_the_exit_code_to_the_script(run, mode):
    text = training("Log", bad=1).replace("opt.step()", "try:\n        opt.step()\n    except Exception:\n        pass")
    assert run(text + "sys.exit(4)\n", *mode)[0] == 1
    code, _, err = run(text + "sys.exit(4)\n", "--no-fail", *mode)
    assert code == 4
    assert "error[NH" in err


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise ValueError('later')", "raise KeyboardInterrupt"])
def test_exact_report_comes_however_the_script_ends(run, ending):
    code, out, err = run(training("Log", bad=1) + ending, "--exact")
    assert (code, out) == (1, "done\n")
    traceback, _, report = err.partition("\ntrain.py\n")
    assert "error[NH501]: log of 0" in report
    last = traceback.splitlines()[-1:]
    assert last == {"sys": [], "raise ValueError('later')": ["ValueError: later"]}.get(ending, last)


def test_operation_that_refuses_its_input_is_a_fault(run):
    text = MODEL + (
        "net = nn.Linear(2, 2)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "torch.linalg.cholesky(-net(torch.ones(2, 2)).square()).sum().backward()\nopt.step()\n"
    )
    code, _, err = run(text)
    assert code == 1
    assert "LinAlgError" in err
    assert "step 0 ended in an error: linalg.cholesky" in err


# What is found by itself


def test_two_models_with_an_optimizer_each_are_both_watched(run):
    text = (
        MODEL
        + """
torch.manual_seed(0)
maker, judge = Net(nn.Identity()), Net(Root())
first = torch.optim.SGD(maker.fc.parameters(), lr=0.0)
second = torch.optim.SGD(judge.parameters(), lr=0.0)
for step in range(4):
    for net, opt in ((maker, first), (judge, second)):
        x = torch.ones(3, 2)
        if net is judge and step == 2:
            x[0] = 0
        opt.zero_grad()
        net(x).backward()
        opt.step()
"""
    )
    code, _, err = run(text, "--json", "report.json")
    assert code == 1
    where = json.loads(Path("report.json").read_text())["findings"][0]["location"]
    assert (where["phase"], where["module"], where["step"]) == ("backward", "last.1", 2)
    assert err.count("error[") == 1


def test_one_model_with_two_optimizers_is_watched_in_both(run):
    text = (
        MODEL
        + """
net = Net(nn.Sequential(nn.Linear(2, 2), Root()))
opts = [torch.optim.SGD(net.fc.parameters(), lr=0.0), torch.optim.SGD(net.last.parameters(), lr=0.0)]
for step in range(3):
    net.zero_grad()
    net(torch.ones(3, 2) * (step < 2)).backward()
    for opt in opts:
        opt.step()
"""
    )
    text = text.replace("self.fc(x).square()", "self.fc(x)").replace("torch.sqrt(x)", "torch.sqrt(x.square())")
    text = text.replace("nn.Linear(2, 2), Root", "nn.Linear(2, 2, bias=False), Root")
    code, _, err = run(text)
    assert code == 1
    assert "step 2 is non-finite" in err
    assert "last.1.1\n" in err


def test_part_that_a_holder_trains_is_named_as_in_the_holder(run):
    text = (
        MODEL
        + """
class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(Root())

    def training_step(self, x):
        return self.net(x)

task = Task()
opt = torch.optim.SGD(task.parameters(), lr=0.0)
for step in range(3):
    def closure():
        opt.zero_grad()
        loss = task.training_step(torch.ones(2, 2) * (step < 1))
        loss.backward()
        return loss
    opt.step(closure)
"""
    )
    for mode in ([], ["--exact"]):
        code, _, err = run(text, *mode)
        assert code == 1
        assert "  --> net.last.1\n" in err
        assert "step 1" in err


def test_first_step_of_a_closure_is_judged(run):
    text = (
        MODEL
        + """
net = Net(Root())
opt = torch.optim.LBFGS(net.parameters(), max_iter=2)
def closure():
    opt.zero_grad()
    loss = net(torch.zeros(2, 2))
    loss.backward()
    return loss
opt.step(closure)
print("went on")
"""
    )
    code, out, err = run(text)
    assert (code, out) == (1, "")
    assert "error[NH201]: step 0 is non-finite" in err


def test_optimizer_of_plain_tensors_is_watched(run):
    text = """
import torch
w = torch.ones(3, requires_grad=True)
opt = torch.optim.SGD([w], lr=0.0)
for step in range(3):
    opt.zero_grad()
    torch.sqrt(w * (step < 1)).sum().backward()
    opt.step()
"""
    code, _, err = run(text)
    assert code == 1
    assert "step 1 is non-finite: loss 0 (finite), 1 of 1 gradients non-finite" in err


BY_HAND = """
import torch
w = torch.ones(3, requires_grad=True)
for step in range(3):
    torch.sqrt(w * (step < 1)).sum().backward()
    with torch.no_grad():
        w -= 0.1 * w.grad
    w.grad = None
"""


def test_what_could_not_be_watched_is_said(run):
    said = "nanhunt: not done: every step: no step of a torch optimizer was seen\n"
    assert run(BY_HAND) == (0, "", said)
    assert run("print(5)") == (0, "5\n", said)
    assert run("print(5)", "--exact") == (0, "5\n", "nanhunt: not done: every step: no operation of torch was run\n")


def test_exact_run_needs_neither_model_nor_optimizer(run):
    code, _, err = run(BY_HAND, "--exact")
    assert code == 1
    assert "train.py:5\n" in err


def test_model_can_be_copied_and_saved_while_it_is_watched(run):
    text = training("Log").replace(
        "    opt.step()\n",
        "    opt.step()\n"
        "    import copy, io\n"
        "    best = copy.deepcopy(net)\n"
        "    torch.save(net, io.BytesIO())\n"
        "    assert not best._forward_hooks and not best._forward_pre_hooks\n",
    )
    assert run(text) == (0, "done\n", "")


# What torch.compile warns of while it compiles is its own affair.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", ["net = torch.compile(net, {})", "net.compile({})", "net.last[1].compile({})"])
def test_compiled_model_is_watched_without_being_in_its_way(run, compiled):
    # Where a hook for all modules took keyword arguments, torch keeps a mark of it after it was removed, and warns.
    torch.nn.modules.module._global_forward_hooks_with_kwargs.clear()
    how = 'backend="aot_eager", fullgraph=True'
    text = training("Log", bad=3).replace("\nopt =", f"\n{compiled.format(how)}\nopt =")
    code, _, err = run(text)
    assert code == 1
    assert "step 3 is non-finite: loss -inf" in err
    assert "Traceback" not in err


ONE_AFTER_THE_OTHER = """
import gc, weakref
models = []
def train(steps, scale=1.0):
    net = Net(Log())
    models.append(weakref.ref(net))
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    for step in range(steps):
        opt.zero_grad()
        (net(torch.ones(1, 2)) * scale).backward()
        opt.step()
train(3)
train(300)
train(3)
gc.collect()
print([model() is None for model in models])
train(3, float("nan"))
"""


def test_models_trained_one_after_the_other_are_let_go_and_all_watched(run):
    code, out, err = run(MODEL + ONE_AFTER_THE_OTHER)
    assert code == 1
    # The second is watched still; nothing tells that its time is over.
    assert out == "[True, False, False]\n"
    assert "step 0 is non-finite: loss nan" in err


def test_torch_is_left_as_it_was(run):
    def parts():
        return (
            torch.autograd.backward,
            torch.nn.Module.__call__,
            torch.nn.Module.__getstate__,
            torch.optim.Optimizer.__init__,
            torch.amp.GradScaler.__init__,
        )

    before = parts()
    for text in (training("Log", bad=1), training("Log"), "import torch\ntorch.optim.SGD([torch.ones(1)])\n1 / 0"):
        run(text)
        assert all(new is old for new, old in zip(parts(), before, strict=True))


# Misuse


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ([], "none.py", "nanhunt: no such file: none.py"),
        ([], ".", "nanhunt: . is a folder without a __main__.py"),
        ([], "notes.md", "nanhunt: notes.md is not a Python file"),
        ([], "weights.pt", "nanhunt: weights.pt is not a Python file"),
        (["-m"], "absent.module", "nanhunt: no module named absent.module"),
        (["-m"], "train.py", "nanhunt: no module named train.py"),
        (["-m"], "json", "nanhunt: json is a package without a __main__ and cannot be run"),
        (["-m"], "math", "nanhunt: there is no Python code to run in math"),
        (["--on-fault", "stop"], "train.py", "nanhunt: --on-fault is raise, skip or record, not 'stop'"),
        (
            ["--exact", "--out", "x"],
            "train.py",
            "nanhunt: --out says what the sentinel does and cannot go with --exact",
        ),
        (["--json", "train.py/x.json"], "train.py", "nanhunt: cannot write train.py/x.json: "),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(here, run, options, name, said):
    (here / "notes.md").write_text("# Notes\n\nnot Python at all\n")
    (here / "weights.pt").write_bytes(b"PK\x03\x04\x00\x00\xff")
    (here / "train.py").write_text("import torch\n")
    code, out, err = run(None, *options, name=name)
    lines = [line for line in err.splitlines() if not line.startswith("nanhunt: not done")]
    assert (code, out) == (2, "")
    assert lines[0].startswith(said)
    assert all(line.startswith("  help: ") for line in lines[1:])


@pytest.mark.parametrize("options", [["--frobnicate"], ["--max-captures", "-1"], []])
def test_wrong_options_are_refused(run, options):
    code, out, err = run(None, *options, name="")
    assert (code, out) == (2, "")
    assert "Usage: nanhunt run" in err


# Processes


def test_ctrl_c_ends_the_script_and_gives_the_report(here):
    text = training("Log", bad=1) + "print('waiting', flush=True)\nimport time\ntime.sleep(60)\n"
    (here / "train.py").write_text(text)
    started = subprocess.Popen(
        [sys.executable, "-m", "nanhunt", "run", "--exact", "train.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert [started.stdout.readline() for _ in range(2)] == ["done\n", "waiting\n"]
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (1, "")
    assert "KeyboardInterrupt\n\ntrain.py\n" in err
    assert "error[NH501]" in err


def test_ctrl_c_in_a_healthy_script_is_exit_code_130(here, run):
    (here / "train.py").write_text("raise KeyboardInterrupt\n")
    code, out, err = run(None)
    assert (code, out) == (130, "")
    assert err.startswith(python(here, "train.py")[2])


def test_stream_that_the_script_put_in_place_of_standard_output_is_no_error(run):
    text = "import sys, io\nsys.stdout = io.StringIO()\nimport torch\nprint('away')\n"
    code, out, _ = run(text)
    assert (code, out) == (0, "")


def test_process_that_the_script_forks_gives_no_second_report(here):
    text = training("Log", bad=1) + "import os\nif os.fork():\n    os.wait()\n"
    (here / "train.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nanhunt", "run", "--exact", "train.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.count("error[NH501]") == 1
