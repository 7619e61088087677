"""Every recipe: the broken form yields exactly the findings it states, the fixed form none."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch

import nanhunt
import recipes

NAMES = [module.name for module in iter_modules(recipes.__path__)]


def capture_one_step(name: str, folder: Path, *, fixed: bool) -> tuple[object, Path | None]:
    """Trains the recipe for one step under the sentinel; the target, and the capture if there was a fault."""
    target, batch = import_module(f"recipes.{name}").RECIPE.build(fixed)
    model = target.build(0)
    optimizer = target.optimizer(model)
    with nanhunt.watch(model, optimizer, out_dir=folder, target="recipe", on_fault="skip") as hunt:
        for item in hunt.batches([batch]):
            target.loss(model, item).backward()
            optimizer.step()
    return target, hunt.faults[0].capture if hunt.faults else None


def test_there_are_recipes() -> None:
    assert NAMES


@pytest.mark.filterwarnings("ignore:nanhunt. step 0 is non-finite:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_broken_recipe_yields_exactly_its_findings(name: str, tmp_path: Path) -> None:
    target, capture = capture_one_step(name, tmp_path, fixed=False)
    assert capture is not None
    report = nanhunt.replay(capture, target=target, num_seeds=0)
    assert tuple(finding.code for finding in report.findings) == import_module(f"recipes.{name}").RECIPE.expects
    assert report.findings[0].certainty == "tested"


@pytest.mark.parametrize("name", NAMES)
def test_fixed_recipe_is_finite(name: str, tmp_path: Path) -> None:
    _, capture = capture_one_step(name, tmp_path, fixed=True)
    assert capture is None
    target, batch = import_module(f"recipes.{name}").RECIPE.build(True)
    model = target.build(0)
    target.loss(model, batch).backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
