"""A capture replays without knowing the loss: from the model's own inputs and the gradients of its outputs."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.capture.format import Capture, read_capture, write_capture
from nanhunt.capture.replay import Replayer
from nanhunt.capture.step import Change
from nanhunt.observe.exact import ExactTracer
from nanhunt.records.ops import OpRecord, StateSource, Trace
from nanhunt.records.steps import Determinism
from nanhunt.targets import Target

NAN = math.nan


class Net(nn.Module):
    """Non-finite where asked: ``sqrt`` at 0 going back, ``log`` of 0 going forward."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(4, 2)

    def forward(self, rows: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.drop(self.norm(self.first(rows)).tanh()) * scale
        if self.fault == "backward":
            hidden = hidden + (hidden * 0).sqrt()
        if self.fault == "forward":
            hidden = hidden + (hidden * 0).log()
        return {"logits": self.head(hidden), "count": rows.shape[0]}


class BuildOnly:
    """A target that knows no loss."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def build(self, seed: int) -> nn.Module:
        return Net(self.fault)


class Whole(BuildOnly):
    """A target that knows the whole step."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["rows"])["logits"].square().mean()


def batches(number: int = 4) -> list[dict[str, Tensor]]:
    return [{"rows": torch.randn(5, 3)} for _ in range(number)]


def captured(
    folder: Path,
    target: BuildOnly,
    *,
    name: str = "",
    fault_at: int = 2,
    outside: str = "",
    micro_steps: int = 1,
    scaler: Any = None,
    autocast: bool = False,
    noted: bool = True,
) -> Path:
    """Trains until the step that goes non-finite, and gives its capture."""
    whole = Whole()
    model = Net()
    optimizer = whole.optimizer(model)
    with nanhunt.watch(model, optimizer, out_dir=folder, target=name, scaler=scaler, on_fault="skip") as hunt:
        loader = batches((fault_at + 1) * micro_steps)
        for position, batch in enumerate(hunt.batches(loader) if noted else loader):
            model.fault = target.fault if position >= fault_at * micro_steps else ""
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = whole.loss(model, batch)
            if outside and position == fault_at:
                loss = (loss * 0).sqrt()
            (scaler.scale(loss) if scaler is not None else loss).backward()
            if (position + 1) % micro_steps == 0:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if position // micro_steps == fault_at:
                    with pytest.warns(RuntimeWarning, match="non-finite"):
                        optimizer.step()
                else:
                    optimizer.step()
                if scaler is not None:
                    scaler.update()
                optimizer.zero_grad()
    [fault] = hunt.faults
    return fault.capture


def replayed(path: Path, target: BuildOnly) -> tuple[Trace, Determinism]:
    replayer = Replayer(read_capture(path), Target("test", target))
    tracer = ExactTracer()
    step = replayer.run(tracer=tracer)
    assert tracer.trace.problems == ()
    return tracer.trace, replayer.determinism(step)


def modified(path: Path, folder: Path, change: Any) -> Path:
    """The capture with something in its payload changed, written anew."""
    capture = read_capture(path)
    payload = copy.deepcopy(capture.payload)
    change(payload)
    return write_capture(Capture(capture.meta, payload), folder)


# Without a target name: the model's own inputs and output gradients.


def test_capture_without_a_target_holds_inputs_and_output_gradients(tmp_path: Path):
    capture = read_capture(captured(tmp_path, BuildOnly("backward")))

    [call] = capture.payload["calls"]
    assert (len(call["args"]), tuple(call["args"][0].shape), call["kwargs"]) == (1, (5, 3), {})
    assert {key: tuple(gradient.shape) for key, gradient in call["output_grads"].items()} == {"0": (5, 2)}
    assert bool(call["output_grads"]["0"].isfinite().all())


@pytest.mark.parametrize(
    ("fault", "op", "phase", "forward_op"),
    [("backward", "aten::div", "backward", "aten::sqrt"), ("forward", "aten::log", "forward", None)],
)
def test_offender_inside_the_model_is_found_from_its_inputs(
    fault: str, op: str, phase: str, forward_op: str | None, tmp_path: Path
):
    path = captured(tmp_path, BuildOnly(fault))
    trace, determinism = replayed(path, BuildOnly(fault))

    offender = trace.first_offender
    assert isinstance(offender, OpRecord)
    assert (offender.op, offender.phase, offender.forward_op) == (op, phase, forward_op)
    assert offender.source.file == __file__
    assert determinism == Determinism("bit-identical", "6 of 6 gradients")


def test_offender_outside_the_model_is_the_gradient_that_came_in(tmp_path: Path):
    trace, determinism = replayed(captured(tmp_path, BuildOnly(), outside="loss"), BuildOnly())

    offender = trace.first_offender
    assert isinstance(offender, StateSource)
    assert offender.name == "gradient of output 0"
    assert determinism.status == "bit-identical"


def test_whole_replay_with_only_a_builder_names_the_offender(tmp_path: Path):
    path = captured(tmp_path, BuildOnly("backward"), noted=False)

    report = nanhunt.replay(path, target=BuildOnly("backward"), num_seeds=1)

    assert [finding.code for finding in report.findings] == ["NH202"]
    assert report.determinism.status == "bit-identical"


def test_accumulated_calls_are_all_replayed(tmp_path: Path):
    path = captured(tmp_path, BuildOnly("backward"), micro_steps=2)

    trace, determinism = replayed(path, BuildOnly("backward"))

    assert len(read_capture(path).payload["calls"]) == 2
    assert determinism.status == "bit-identical"
    assert trace.first_offender.forward_op == "aten::sqrt"


# With a target name: batches.


def test_capture_with_a_target_holds_batches_and_their_control(tmp_path: Path):
    capture = read_capture(captured(tmp_path, Whole("backward"), name="somewhere"))

    assert (len(capture.batches), len(capture.payload["control"]), capture.payload["calls"]) == (1, 1, [])
    assert set(capture.batches[0]) == {"rows"}
    assert capture.meta["target"] == {"name": "somewhere", "config": None}


@pytest.mark.parametrize("fault", ["backward", "forward"])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_step_with_dropout_and_batch_norm_replays_bit_for_bit(fault: str, micro_steps: int, tmp_path: Path):
    path = captured(tmp_path, Whole(fault), name="somewhere", micro_steps=micro_steps)

    trace, determinism = replayed(path, Whole(fault))

    assert determinism == Determinism("bit-identical", "loss and 6 of 6 gradients")
    assert trace.first_offender.phase == fault
    assert len(read_capture(path).batches) == micro_steps


@pytest.mark.parametrize("passed_backward", [False, True])
def test_step_after_one_that_the_loop_dropped_replays_bit_for_bit(passed_backward: bool, tmp_path: Path):
    whole, model = Whole("backward"), Net()
    optimizer = whole.optimizer(model)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path, target="x", on_fault="skip") as hunt:
        for position, batch in enumerate(hunt.batches(batches(3))):
            optimizer.zero_grad()
            model.fault = "backward" if position == 2 else ""
            loss = whole.loss(model, batch)
            if position == 1 and not passed_backward:
                continue
            loss.backward()
            if position == 2:
                with pytest.warns(RuntimeWarning, match="non-finite"):
                    optimizer.step()
            elif position == 0:
                optimizer.step()

    path = hunt.faults[0].capture
    assert len(read_capture(path).batches) == 1
    assert replayed(path, whole)[1] == Determinism("bit-identical", "loss and 6 of 6 gradients")


def test_replay_is_the_same_however_often_it_runs(tmp_path: Path):
    replayer = Replayer(
        read_capture(captured(tmp_path, Whole("backward"), name="x")), Target("test", Whole("backward"))
    )

    checksums = [replayer.run().gradient_checksums for _ in range(3)]

    assert checksums[0] == checksums[1] == checksums[2]
    assert len(checksums[0]) == 6


def test_replay_leaves_the_generators_of_the_process_alone(tmp_path: Path):
    path = captured(tmp_path, Whole("backward"), name="x")
    before = torch.get_rng_state()

    replayed(path, Whole("backward"))

    assert torch.equal(torch.get_rng_state(), before)


def test_scaled_step_replays_bit_for_bit(tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path = captured(tmp_path, Whole("backward"), name="x", scaler=scaler)

    assert read_capture(path).payload["scaler"]["scale"] == 1024.0
    assert replayed(path, Whole("backward"))[1].status == "bit-identical"


@pytest.mark.parametrize("name", ["", "somewhere"])
def test_step_under_autocast_replays_bit_for_bit(name: str, tmp_path: Path):
    path = captured(tmp_path, Whole("backward"), name=name, autocast=True)

    assert read_capture(path).meta["autocast"] == {"device": "cpu", "dtype": "bfloat16"}
    assert replayed(path, Whole("backward") if name else BuildOnly("backward"))[1].status == "bit-identical"


def test_backward_pass_of_a_replay_is_outside_autocast_as_in_the_loop(tmp_path: Path):
    class Watching(Whole):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            loss = super().loss(model, batch)
            loss.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
            seen.append(torch.is_autocast_enabled("cpu"))
            return loss

    seen: list[bool] = []
    path = captured(tmp_path, Whole("backward"), name="x", autocast=True)

    replayed(path, Watching("backward"))

    assert seen == [True, False]


def test_clipping_is_replayed_as_in_the_loop(tmp_path: Path):
    class Clipping(Whole):
        max_grad_norm = 1e-3

    path = captured(tmp_path, Whole("backward"), name="x")

    step = Replayer(read_capture(path), Target("test", Clipping("backward"))).run()

    # One NaN makes the total norm NaN, and the norm makes every gradient NaN.
    assert (step.outcome.gradients.tensors, step.outcome.clipped.tensors) == (4, 6)


def test_modified_weight_is_said_to_differ(tmp_path: Path):
    path = captured(tmp_path / "one", Whole("backward"), name="x")

    def double(payload: dict[str, Any]) -> None:
        payload["model"]["head.weight"][0, 0] *= 2

    _, determinism = replayed(modified(path, tmp_path / "two", double), Whole("backward"))

    assert determinism.status == "differs"
    assert determinism.detail.startswith("loss ")


def test_modified_input_is_said_to_differ_without_a_target(tmp_path: Path):
    path = captured(tmp_path / "one", BuildOnly("backward"))

    def double(payload: dict[str, Any]) -> None:
        payload["calls"][0]["args"][0] *= 2

    _, determinism = replayed(modified(path, tmp_path / "two", double), BuildOnly("backward"))

    assert determinism.status == "differs"
    assert " of 6 gradients, first " in determinism.detail


def test_modified_generator_is_said_to_differ(tmp_path: Path):
    path = captured(tmp_path / "one", Whole("backward"), name="x")

    def reseed(payload: dict[str, Any]) -> None:
        payload["rng"]["torch"] = torch.Generator().manual_seed(99).get_state()

    assert replayed(modified(path, tmp_path / "two", reseed), Whole("backward"))[1].status == "differs"


def test_change_that_cures_the_model_makes_the_boundary_replay_finite(tmp_path: Path):
    replayer = Replayer(read_capture(captured(tmp_path, BuildOnly("backward"))), Target("test", BuildOnly("backward")))

    def cure(model: nn.Module) -> None:
        model.fault = ""

    assert replayer.run().outcome.failed_phase == "backward"
    assert replayer.run(change=Change("cure", "no root", "model", model=cure)).outcome.is_finite


# A step that ended in an error.


class Decomposed(Whole):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["rows"])["logits"]
        covariance = logits @ logits.mT
        return torch.linalg.eigvalsh(covariance * 0 / batch["norm"]).sum()


def test_refused_decomposition_replays_to_the_birth_of_what_it_refused(tmp_path: Path):
    target = Decomposed()
    model = Net()
    optimizer = target.optimizer(model)

    def loop(hunt: Any) -> None:
        for batch in hunt.batches([{"rows": torch.randn(5, 3), "norm": torch.zeros(())}]):
            target.loss(model, batch).backward()

    with pytest.raises(torch.linalg.LinAlgError), nanhunt.watch(model, optimizer, out_dir=tmp_path, target="x") as hunt:
        loop(hunt)

    [fault] = hunt.faults
    trace, determinism = replayed(fault.capture, target)
    assert trace.first_offender.op == "aten::div"
    assert trace.sinks[0].name == "refused by aten::_linalg_eigh"
    assert determinism == Determinism("unknown", "the step ended in the same error as the captured one")


def test_capture_without_a_target_asks_for_one(tmp_path: Path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nanhunt.watch(model, optimizer, out_dir=tmp_path):
        model(torch.full((1, 2), float("nan"))).sum().backward()
        with pytest.raises(nanhunt.NonFiniteStep):
            optimizer.step()

    with pytest.raises(nanhunt.TargetError, match="the capture names no target; say how the model is built: --target"):
        nanhunt.replay(tmp_path / "bad_batch_000000.pt")
