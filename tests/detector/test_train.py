"""The trainer: its optimizer, its schedule, its checkpoints, and how it fails."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nanhunt
from detector.config import PRESETS, DetectorConfig, TrainConfig
from detector.optim import learning_rate_factor, parameter_groups
from detector.target import DetectorTarget
from detector.train import DivergedError, StepStats, Trainer
from detector.windows import Batch, synthetic_batches


def tiny(preset: str = "small", **train: Any) -> DetectorConfig:
    """The preset with two-second windows, two at a time."""
    config = PRESETS[preset]
    return replace(config, train=replace(config.train, window_s=2.0, batch_size=2, **train))


class Named(nn.Module):
    """Modules whose names lie about what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.dbnet = nn.Linear(2, 3)
        self.seq = nn.Sequential(nn.Conv1d(1, 1, 1), nn.LayerNorm(3))
        self.embedding = nn.Embedding(4, 2)


def test_decay_groups_follow_module_types_and_not_names() -> None:
    model = Named()
    decayed, spared = parameter_groups(model, 0.05, decay_groups="by_module_type")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"dbnet.weight", "seq.0.weight"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_mamba_rates_and_norms_are_spared() -> None:
    model = DetectorTarget(PRESETS["small"]).build(0)
    _, spared = parameter_groups(model, 0.05, decay_groups="by_module_type")
    kept = {id(parameter) for parameter in spared["params"]}
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias", "bias")):
            assert id(parameter) in kept, name


def test_incident_decays_every_parameter_in_one_group() -> None:
    model = DetectorTarget(PRESETS["small-incident"]).build(0)
    optimizer = DetectorTarget(PRESETS["small-incident"]).optimizer(model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05]
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_first_step_runs_at_the_first_warmup_rate_and_the_last_at_zero() -> None:
    factors = [learning_rate_factor(step, warmup_steps=10, schedule_steps=100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    rates: list[float] = []
    config = tiny(warmup_steps=10, learning_rate=1e-3)
    Trainer(config).run(
        synthetic_batches(config.train), num_steps=2, on_step=lambda stats: rates.append(stats.learning_rate)
    )
    assert rates == pytest.approx([1e-4, 2e-4])


def test_training_twice_from_one_seed_gives_the_same_losses_bit_for_bit() -> None:
    def losses() -> list[float]:
        config, seen = tiny(seed=3), []
        Trainer(config).run(synthetic_batches(config.train), num_steps=3, on_step=lambda stats: seen.append(stats.loss))
        return seen

    assert losses() == losses()


def test_the_cure_and_the_incident_start_from_the_same_weights_and_loss() -> None:
    cured, failing = (Trainer(tiny(preset, seed=1)) for preset in ("small", "small-incident"))
    batch = next(synthetic_batches(cured.config.train))
    pairs = zip(cured.model.parameters(), failing.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    torch.manual_seed(0)
    loss = cured.target.loss(cured.model, batch)
    torch.manual_seed(0)
    torch.testing.assert_close(failing.target.loss(failing.model, batch), loss, rtol=1e-4, atol=1e-6)


def poisoned(config: TrainConfig, *, at: int) -> list[Batch]:
    """Batches of which one holds a NaN sample."""
    batches = [batch for batch, _ in zip(synthetic_batches(config), range(at + 2), strict=False)]
    batches[at]["windows"][0, 3, 100] = math.nan
    return batches


def test_watched_training_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config)
    before: list[torch.Tensor] = []

    def remember(stats: StepStats) -> None:
        before[:] = [parameter.detach().clone() for parameter in trainer.model.parameters()]

    with pytest.raises(nanhunt.NonFiniteStep) as caught:
        trainer.run(poisoned(config.train, at=1), num_steps=3, on_step=remember, out_dir=tmp_path)
    assert caught.value.step == 1
    assert caught.value.capture == str(tmp_path / "bad_batch_000001.pt")
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))


def test_skipped_step_leaves_training_finite(tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config)
    with pytest.warns(RuntimeWarning, match="step 1 is non-finite"):
        trainer.run(poisoned(config.train, at=1), num_steps=3, out_dir=tmp_path, on_fault="skip")
    assert trainer.num_steps_done == 3
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


def test_unwatched_incident_ends_with_the_number_of_lost_weights() -> None:
    config = tiny("small-incident")
    trainer = Trainer(config)
    number = len(list(trainer.model.parameters()))
    with pytest.raises(DivergedError, match=f"{number} of {number} weight tensors non-finite"):
        trainer.run(poisoned(config.train, at=0), num_steps=1)


def test_checkpoint_is_read_back_and_replaces_captured_weights(tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config, target_name="detector.small")
    with pytest.raises(nanhunt.NonFiniteStep) as caught:
        trainer.run(poisoned(config.train, at=0), num_steps=1, out_dir=tmp_path)
    trainer.save(tmp_path / "last.pt")
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    assert caught.value.capture is not None
    report = nanhunt.replay(caught.value.capture, checkpoint=tmp_path / "last.pt", num_seeds=0)
    assert report.grid[0].weights == "checkpoint"
    assert report.first is not None
    assert report.first.code == "NH601"


def test_unknown_configuration_field_is_named() -> None:
    with pytest.raises(ValueError, match="unknown configuration field 'learning_rat'"):
        DetectorConfig.from_dict({"train": {"learning_rat": 1.0}})


def test_configuration_survives_json() -> None:
    config = PRESETS["small-incident"]
    assert DetectorConfig.from_dict(config.to_dict()) == config


def test_small_trains_on_the_input_that_stops_its_failing_twin() -> None:
    config = tiny(seed=4)
    stats: list[StepStats] = []
    trainer = Trainer(config)
    trainer.run(synthetic_batches(config.train), num_steps=20, on_step=stats.append)
    assert len(stats) == 20
    assert all(math.isfinite(item.loss) and math.isfinite(item.gradient_norm) for item in stats)
