"""Targets: found by name, built, and every failure in them one line."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from nanhunt import targets
from nanhunt.errors import TargetError
from nanhunt.targets import Target, find_target

MODULE = """
from torch import nn
import torch

def build():
    return nn.Linear(2, 1)

def wrong():
    return 5

def broken():
    raise RuntimeError("size mismatch\\nin two lines")

class Full:
    config = {"width": 2}

    def __init__(self, width=2):
        self.width = width

    def build(self, seed):
        return nn.Linear(self.width, 1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(self, model, batch):
        return {"one": model(batch).sum(), "two": torch.tensor(2.0)}

    def configure(self, config):
        return Full(config["width"])

full = Full()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_target.py").write_text(MODULE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_target", "my_package", "my_package.models"):
        sys.modules.pop(name, None)


@pytest.fixture
def installed(monkeypatch):
    """Gives ``nanhunt.targets`` other entry points than those of this installation."""

    def install(**values):
        points = [EntryPoint(name.replace("_", "."), value, targets.GROUP) for name, value in values.items()]
        monkeypatch.setattr(targets, "entry_points", lambda group: points)

    return install


def refusal(ask) -> str:
    with pytest.raises(TargetError) as caught:
        ask()
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_the_installed_targets_can_be_found():
    for name in ("detector", "detector.v3", "detector.incident", "detector.small", "detector.small-incident"):
        target = find_target(name)
        assert target.name == name
        assert target.has_loss
        assert target.has_optimizer


@pytest.mark.parametrize("spec", ["my_target:full", "my_package.models:full", "my_target:Full.build"])
def test_module_and_attribute_name_a_target(module, spec):
    assert find_target(spec).name == spec


def test_a_target_builds_model_optimizer_and_loss(module):
    target = find_target("my_target:full")
    model = target.build(3)
    assert isinstance(model, nn.Linear)
    assert isinstance(target.optimizer(model), torch.optim.SGD)
    with torch.no_grad():
        expected = model(torch.ones(2)).sum() + 2.0
        assert torch.equal(target.loss(model, torch.ones(2)), expected)
    assert target.control_batch(0) is None
    assert target.variants() == {}
    assert target.max_grad_norm is None


def test_a_function_or_a_module_class_is_a_target(module):
    target = find_target("my_target:build")
    assert isinstance(target.build(0), nn.Linear)
    assert not target.has_loss
    assert not target.has_optimizer
    assert isinstance(Target("bilinear", lambda: nn.Bilinear(1, 1, 1)).build(0), nn.Bilinear)


def test_the_seed_decides_the_weights(module):
    target = find_target("my_target:build")
    one, same, other = target.build(1), target.build(1), target.build(2)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "no target 'nothing'; give module:attribute or one of: detector, detector."),
        ("", "no target ''"),
        ("no_such_module:x", "cannot import no_such_module: No module named 'no_such_module'; is its folder on PYTHON"),
        ("my_target:absent", "target 'my_target:absent': my_target has no attribute absent"),
        ("my_target:Full.absent", "my_target has no attribute Full.absent"),
        ("my_target:", "my_target has no attribute"),
        (":build", "target ':build': importing  failed: ValueError: Empty module name"),
        ("..my_target:build", "importing ..my_target failed: TypeError"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(module, spec, said):
    assert said in refusal(lambda: find_target(spec))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import absent_package", "No module named 'absent_package'"),
        ("raise RuntimeError('no data\\nhere')", "importing breaks failed: RuntimeError: no data"),
        ("def f(:", "importing breaks failed: SyntaxError"),
        ("import sys; sys.exit('usage: breaks DATA')", "importing breaks failed: SystemExit: usage: breaks DATA"),
        ("from torch import absent_name", "importing breaks failed: ImportError: cannot import name 'absent_name'"),
    ],
)
def test_a_module_that_fails_on_import_is_one_line(module, body, said):
    (module / "breaks.py").write_text(body)
    assert said in refusal(lambda: find_target("breaks:target"))


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("wrong", "target my_target:wrong built a int, not a torch.nn.Module"),
        ("broken", "target my_target:broken cannot be built: RuntimeError: size mismatch"),
        ("nn", "target my_target:nn cannot be built: TypeError: 'module' object is not callable"),
        ("Full", "target my_target:Full cannot be built: TypeError"),
    ],
)
def test_what_builds_no_module_is_one_line(module, attribute, said):
    assert said in refusal(lambda: find_target(f"my_target:{attribute}").build(0))


class Failing:
    def build(self, seed):
        return nn.Linear(1, 1)

    def optimizer(self, model):
        raise ValueError("no parameters\nat all")

    def control_batch(self, seed):
        raise FileNotFoundError(2, "No such file or directory", "data.npy")

    def configure(self, config):
        raise AttributeError("no width\nin it")


def test_whatever_else_fails_in_a_target_is_one_line():
    target = Target("mine", Failing())
    model = target.build(0)
    assert refusal(lambda: target.optimizer(model)) == "target mine gives no optimizer: ValueError: no parameters"
    assert "mine gives no control batch: FileNotFoundError: [Errno 2]" in refusal(lambda: target.control_batch(0))
    said = "target mine does not take the capture's configuration: AttributeError: no width"
    assert refusal(lambda: target.configured({})) == said


# What a capture says of its target


def test_the_target_a_capture_names_is_configured_as_it_was(installed, module):
    installed(mine="my_target:full")
    target = find_target(None, {"name": "mine", "config": {"width": 7}})
    assert target.name == "mine"
    assert target.build(0).in_features == 7
    assert find_target("mine", {"name": "mine", "config": {"width": 7}}).build(0).in_features == 7
    assert find_target(None, {"name": "mine", "config": None}).build(0).in_features == 2


def test_a_configuration_of_another_target_is_not_used(installed, module):
    installed(mine="my_target:full", other="my_target:full")
    assert find_target("mine", {"name": "other", "config": {"width": 7}}).build(0).in_features == 2
    assert find_target("my_target:full", {"name": "mine", "config": {"width": 7}}).build(0).in_features == 2


def test_a_configuration_that_does_not_fit_is_one_line(installed, module):
    installed(mine="my_target:full")
    said = refusal(lambda: find_target(None, {"name": "mine", "config": {"depth": 7}}))
    assert said == "target mine does not take the capture's configuration: KeyError: 'width'"


def test_a_configuration_the_detector_cannot_take_is_one_line():
    said = refusal(lambda: find_target("detector", {"name": "detector", "config": {"model": 5}}))
    assert said.startswith("target detector does not take the capture's configuration")


@pytest.mark.parametrize("name", ["planted:target", "os:system", "planted", "../planted", 5, ["detector"], {"a": 1}])
def test_a_name_inside_a_capture_imports_nothing(tmp_path, monkeypatch, name):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w').close()\ntarget = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = refusal(lambda: find_target(None, {"name": name}))
    assert said == f"the capture was made with the target {name!r}, which is not installed; give --target"
    assert "planted" not in sys.modules
    assert not (tmp_path / "witness").exists()
    # The same name on the command line is the user's own word.
    find_target("planted:target", {"name": name})
    assert (tmp_path / "witness").exists()
    sys.modules.pop("planted")


def test_without_a_name_the_only_installed_target_is_taken(installed, module):
    installed(mine="my_target:full", mine_small="my_target:full")
    assert find_target(None).name == "mine"
    assert find_target(None, {"name": "", "config": None}).name == "mine"
    installed(mine="my_target:full", other="my_target:full")
    said = refusal(lambda: find_target(None))
    assert said == "the capture names no target; give --target module:attribute or one of: mine, other"
    installed()
    assert refusal(lambda: find_target(None)).endswith("one of: none installed")


@pytest.mark.parametrize("value", ["absent_module:x", "my_target:absent", "breaks:x"])
def test_an_entry_point_that_cannot_be_loaded_is_one_line(installed, module, value):
    (module / "breaks.py").write_text("raise OSError('driver\\nmissing')")
    installed(mine=value)
    assert f"target 'mine' ({value}) cannot be loaded: " in refusal(lambda: find_target("mine"))
