"""Every file in ``bad_batches/`` yields what the manifest says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

import nanhunt
from nanhunt.findings import Report

FOLDER = Path(__file__).parents[2] / "bad_batches"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())
CAPTURES = [name for name, entry in MANIFEST.items() if not entry.get("legacy")]
LEGACY = [name for name, entry in MANIFEST.items() if entry.get("legacy")]


def test_manifest_covers_every_file() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.pt")) == sorted(MANIFEST)


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_file_is_under_three_megabytes(name: str) -> None:
    assert (FOLDER / name).stat().st_size < 3_000_000


@pytest.fixture(scope="module", params=CAPTURES)
def replayed(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Report]:
    """The manifest's entry and the report of a capture, with one fresh initialisation."""
    return MANIFEST[request.param], nanhunt.replay(FOLDER / request.param, num_seeds=1)


def test_capture_yields_the_cause_and_place_of_its_manifest(replayed: tuple[dict[str, Any], Report]) -> None:
    entry, report = replayed
    assert report.first is not None
    location = report.first.location
    assert location.source is not None
    assert {
        "code": report.first.code,
        "cause": report.first.cause,
        "certainty": report.first.certainty,
        "phase": location.phase,
        "op": location.op,
        "forward_op": location.forward_op,
        "module": location.module,
        "file": Path(location.source.file).name,
        "step": location.step,
    } == entry["expects"]
    assert "torch.linalg.eigh" in location.source.text


def test_loss_is_finite_and_gradients_are_not(replayed: tuple[dict[str, Any], Report]) -> None:
    _, report = replayed
    assert report.baseline is not None
    assert report.baseline.failed_phase == "backward"
    assert 0 < report.baseline.gradients.tensors < report.baseline.gradients.num_tensors


def test_clipping_spreads_it_to_every_gradient_and_the_step_to_every_weight(
    replayed: tuple[dict[str, Any], Report],
) -> None:
    _, report = replayed
    assert report.baseline is not None
    assert report.baseline.clipped is not None
    assert report.baseline.clipped.tensors == report.baseline.clipped.num_tensors
    assert report.baseline.weights.tensors == report.baseline.weights.num_tensors


def test_experiments_flip_what_the_manifest_says_and_nothing_it_excludes(
    replayed: tuple[dict[str, Any], Report],
) -> None:
    entry, report = replayed
    assert set(entry["must_flip"]) <= set(report.verdict.flipped)
    assert set(entry["must_not_flip"]) <= set(report.verdict.unmoved)
    assert report.verdict.certainty == "tested"


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_file_says_what_cannot_be_concluded(name: str) -> None:
    report = nanhunt.replay(FOLDER / name, target="detector.small-incident", num_seeds=1)
    assert report.verdict.certainty == "unknown"
    assert "holds a batch only" in report.verdict.text
    assert "does not show that the data or the architecture are sound" in report.verdict.text
    assert report.determinism.status == "unknown"
