"""Twenty architectures that learn, in up to four precisions: nothing is found, by the tracer or the sentinel."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from healthy import NUM_STEPS, PRECISIONS, Learner
from healthy_models import MODELS
from healthy_sequences import SEQUENCES

import nanhunt

LEARNERS: dict[str, Callable[[], Learner]] = {**MODELS, **SEQUENCES}
IN_ALL_PRECISIONS = (
    "perceptron",
    "residual blocks",
    "contrastive pairs",
    "encoder with padding",
    "decoder with a mask of -inf",
)
RUNS = [(name, "float32") for name in LEARNERS]
RUNS += [(name, precision) for name in IN_ALL_PRECISIONS for precision in PRECISIONS[1:]]

each_run = pytest.mark.parametrize(
    ("name", "precision"), RUNS, ids=[f"{name}, {precision}" for name, precision in RUNS]
)


def learner(name: str, precision: str) -> Learner:
    made = LEARNERS[name]()
    if precision == "bfloat16":
        made.model.bfloat16()
    return made


def assert_learned(distances: list[float]) -> None:
    """The run was one: it went on to its end, all was finite, and the model is nearer than it was."""
    assert len(distances) == NUM_STEPS
    assert all(math.isfinite(distance) for distance in distances)
    assert mean(distances[-6:]) < mean(distances[:6])


@each_run
def test_trace_of_a_healthy_run_finds_nothing(name: str, precision: str):
    run = learner(name, precision)
    with nanhunt.trace(run.model, run.optimizers) as hunt:
        distances = run.train(precision)
    report = hunt.report()
    assert report.findings == ()
    assert report.skips == ()
    assert report.verdict.sentences == ("no non-finite value did harm",)
    assert_learned(distances)


@each_run
def test_watch_of_a_healthy_run_saves_nothing(name: str, precision: str, tmp_path: Path):
    run = learner(name, precision)
    with nanhunt.watch(run.model, run.optimizers[0], out_dir=tmp_path / "debug", trace_finite=True) as hunt:
        distances = run.train(precision)
    assert list(hunt.faults) == []
    assert not (tmp_path / "debug").exists()
    assert_learned(distances)


def spoiled() -> Learner:
    """The root of a loss that is zero has no gradient."""
    run = LEARNERS["perceptron"]()
    [loss] = run.losses
    run.losses = (lambda: loss().mul(0).sqrt(),)
    return run


def test_what_is_wrong_in_a_run_would_be_found(tmp_path: Path):
    run = spoiled()
    with nanhunt.trace(run.model, run.optimizers) as hunt:
        run.train(num_steps=1)
    assert [finding.code for finding in hunt.report().findings] == ["NH202"]
    run = spoiled()
    with pytest.raises(nanhunt.NonFiniteStep), nanhunt.watch(run.model, run.optimizers[0], out_dir=tmp_path):
        run.train()
    assert len(list(tmp_path.iterdir())) == 1
