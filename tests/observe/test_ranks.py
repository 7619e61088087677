"""Distributed runs: the first rank that goes non-finite is named on every rank, and nobody else is."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import nanhunt
from nanhunt.capture.format import read_capture
from nanhunt.observe.collectives import own_part

Seen = tuple[dict[str, Any], dict[str, Any]]
PROGRAM = Path(__file__).with_name("ranks_run.py")
SYMPTOMS = "the steps after the fault: what follows it are symptoms"


def run_pair(rendezvous: str, folder: Path, *scenarios: str) -> Seen:
    """Two processes that train together; what each of them saw."""
    command = [sys.executable, "-W", "error", str(PROGRAM)]
    started = [
        subprocess.Popen(
            [*command, str(rank), rendezvous, str(folder), *scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0], said
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return run_pair(f"tcp://127.0.0.1:{port}", folder)


@pytest.fixture(scope="module")
def after_a_crash(tmp_path_factory) -> Seen:
    folder = tmp_path_factory.mktemp("crash")
    return run_pair(f"file://{folder / 'store'}", folder, "raises")


BACKWARD = ("NH202", "backward", "aten::div", "aten::sqrt", [2, 0], "# mark: backward")
COLUMN = ("NH202", "backward", "aten::div", "aten::sqrt", [2, 0], "# mark: column")
SHARD = ("NH202", "backward", "aten::div", "aten::sqrt", [2, 0], "# mark: first shard")
FORWARD = ("NH501", "forward", "aten::log", "", [2, 0], "# mark: forward")

FAULTS_OF_RANK_1 = {
    "ddp forward": FORWARD,
    "ddp backward": BACKWARD,
    "ddp bucket view": BACKWARD,
    "ddp static graph": BACKWARD,
    "ddp small buckets": BACKWARD,
    "ddp accumulation": BACKWARD,
    "ddp compressed": BACKWARD,
    "reduced by hand": BACKWARD,
    "reduced by hand, flat": BACKWARD,
    "fsdp forward": FORWARD,
    "fsdp backward": BACKWARD,
    "fsdp backward in one column": COLUMN,
    "fsdp backward in the shard of rank 0": SHARD,
    "fsdp clipped": COLUMN,
}


def assert_is(finding: dict[str, Any], expected: tuple[Any, ...]) -> None:
    *facts, mark = expected
    assert [finding[key] for key in ("code", "phase", "op", "forward_op", "place")] == facts
    assert finding["line"].endswith(mark)


@pytest.mark.parametrize("name", FAULTS_OF_RANK_1)
def test_both_ranks_name_the_operation_of_the_rank_that_went_bad(seen: Seen, name: str):
    for rank in (0, 1):
        found = seen[rank][name]
        assert found["error"] == ""
        [finding] = found["findings"]
        assert_is(finding, FAULTS_OF_RANK_1[name])
        assert finding["rank"] == 1
        assert finding["notes"] == ["rank 0 received non-finite values from another rank"]
        assert found["chain"][0] == finding["op"] + (" in the backward of aten::sqrt" if finding["forward_op"] else "")
        assert found["skips"] == [SYMPTOMS]


def test_a_fault_of_rank_0_is_named_on_both_ranks(seen: Seen):
    for rank in (0, 1):
        [finding] = seen[rank]["ddp backward on rank 0"]["findings"]
        assert_is(finding, BACKWARD)
        assert finding["rank"] == 0
        assert finding["notes"] == ["rank 1 received non-finite values from another rank"]


def test_a_fault_in_the_second_part_of_a_step_is_placed_there(seen: Seen):
    for rank in (0, 1):
        [finding] = seen[rank]["ddp second part"]["findings"]
        assert (finding["place"], finding["rank"]) == ([2, 1], 1)


@pytest.mark.parametrize("name", ["ddp nan weight everywhere", "fsdp nan weight everywhere"])
def test_the_same_nan_weight_on_all_ranks_is_one_finding(seen: Seen, name: str):
    for rank in (0, 1):
        found = seen[rank][name]
        [finding] = found["findings"]
        assert (finding["code"], finding["phase"], finding["op"]) == ("NH702", "weights", "")
        assert finding["module"].removeprefix("module.") == "body.2"
        assert finding["tensor"].removeprefix("module.") == "body.2.weight"
        assert (finding["place"], finding["rank"]) == ([0, 0], 0)
        assert finding["notes"][-1] == "rank 1 found the same"


def test_a_nan_weight_in_the_shard_of_rank_1_is_found_there(seen: Seen):
    for rank in (0, 1):
        [finding] = seen[rank]["fsdp nan weight on rank 1"]["findings"]
        assert (finding["code"], finding["tensor"], finding["rank"]) == ("NH702", "body.2.weight", 1)
        assert finding["message"].startswith("parameter body.2.weight holds 1 NaN among 16 elements")


ALONE = {
    "ddp alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: backward call"),
    "ddp bucket view alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: backward call"),
    "ddp compressed alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: backward call"),
    "reduced by hand alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: each"),
    "flat alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: flat"),
    "weights alone": ("weights", "c10d::broadcast_", "", "# mark: broadcast"),
    "fsdp masked alone": ("backward", "c10d::_reduce_scatter_base_", "body.2.weight", "# mark: backward call"),
    "fsdp alone": ("backward", "c10d::_reduce_scatter_base_", "body.2.weight", "# mark: backward call"),
    "fsdp nan weight alone": ("weights", "c10d::_allgather_base_", "", "# mark: forward"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_that_hears_nothing_blames_the_collective_and_no_operation_of_its_own(seen: Seen, name: str):
    phase, op, tensor, mark = ALONE[name]
    found = seen[0][name]
    [finding] = found["findings"]
    assert (finding["code"], finding["phase"], finding["op"]) == ("NH207", phase, op)
    assert finding["tensor"].removeprefix("module.") == tensor
    assert finding["message"].startswith(f"{op} brought ")
    assert finding["message"].endswith(" from another rank")
    assert finding["line"].endswith(mark)
    assert finding["rank"] == 0
    assert found["chain"][0] == "collective"
    assert found["skips"] == [SYMPTOMS, "joining the ranks: rank 1 has not answered"]


@pytest.mark.parametrize(
    "name", ["ddp dropped", "fsdp dropped", "ddp overflow of the scale", "fsdp overflow of the scale"]
)
def test_what_all_ranks_dropped_is_no_fault_of_any(seen: Seen, name: str):
    for rank in (0, 1):
        found = seen[rank][name]
        assert (found["error"], found["findings"], found["skips"]) == ("", [], [])


@pytest.mark.parametrize("name", ["ddp healthy", "ddp healthy accumulation", "fsdp healthy"])
def test_a_healthy_run_computes_the_same_bits_and_finds_nothing(seen: Seen, name: str):
    for rank in (0, 1):
        traced, bare = seen[rank][name], seen[rank][f"{name}, untraced"]
        assert (traced["error"], traced["findings"], traced["skips"]) == ("", [], [])
        assert len(traced["losses"]) == 4
        assert (traced["losses"], traced["weights"]) == (bare["losses"], bare["weights"])


def test_what_was_told_before_the_process_group_was_destroyed_is_reported(seen: Seen):
    for rank in (0, 1):
        [finding] = seen[rank]["destroyed"]["findings"]
        assert_is(finding, BACKWARD)
        assert finding["rank"] == 1


def test_a_rank_that_raises_is_named_by_the_others_and_waits_for_none(after_a_crash: Seen):
    survivor, crashed = (side["raises"] for side in after_a_crash)
    assert crashed["error"] == "RuntimeError: loss is nan"
    assert crashed["skips"] == ["joining the ranks: rank 0 has not answered"]
    assert "Connection closed by peer" in survivor["error"]
    assert survivor["skips"] == []
    for side in (survivor, crashed):
        [finding] = side["findings"]
        assert_is(finding, FORWARD)
        assert finding["rank"] == 1


# The sentinel.


def test_two_watched_ranks_share_a_folder_and_say_who_they_are(seen: Seen, folder: Path):
    files = [seen[rank]["watched"]["files"] for rank in (0, 1)]
    assert sorted(files[0] + files[1]) == [
        "bad_batch_000002-1.pt",
        "bad_batch_000002.pt",
        "bad_batch_000003-1.pt",
        "bad_batch_000003.pt",
    ]
    for rank in (0, 1):
        first, second = seen[rank]["watched"]["messages"]
        assert first.startswith(f"step 2 on rank {rank} is non-finite: loss ")
        assert second == f"step 3 on rank {rank} is non-finite: loss nan, 6 of 6 gradients non-finite"
        for name in files[rank]:
            assert read_capture(folder / "captures" / name).meta["environment"]["rank"] == rank


def test_a_sharded_model_is_watched_without_captures(seen: Seen):
    for rank in (0, 1):
        found = seen[rank]["watched in shards"]
        assert (found["error"], found["files"]) == ("", [])
        assert found["messages"][0].startswith(f"step 2 on rank {rank} is non-finite: loss ")
        assert found["problems"][0].startswith("the model is sharded over several processes")


# What a rank sent itself.


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gathered(value: Tensor) -> Tensor:
    result = torch.empty_like(value)
    dist.all_gather([result], value)
    return result


def reduced(value: Tensor) -> Tensor:
    return funcol.all_reduce(value, "sum", dist.group.WORLD).clone()


@pytest.mark.parametrize("carry", [gathered, reduced])
def test_what_comes_back_of_a_rank_s_own_fault_is_its_own(group: None, carry: Callable[[Tensor], Tensor]):
    weight = torch.ones(2, requires_grad=True)
    with nanhunt.trace() as hunt:
        values = carry(torch.zeros(2).log())  # mark: own
        (weight * values).sum().backward()
    report = hunt.report()
    [finding] = report.findings
    assert (finding.location.op, finding.location.source.text.split("# ")[-1]) == ("aten::log", "mark: own")
    assert report.skips == ()


def test_a_result_that_is_still_on_its_way_is_not_looked_at(group: None):
    with nanhunt.trace() as hunt:
        value = torch.full((3,), 2.0)
        result = torch.empty(3)
        work = dist.all_gather([result], value, async_op=True)
        unfinished = result.view(3).detach()
        work.wait()
        loss = (unfinished * torch.ones(3, requires_grad=True)).sum()
        loss.backward()
    assert hunt.report().findings == ()


def test_the_piece_of_a_value_that_is_on_its_way_is_left_alone():
    class OnItsWay(torch.Tensor):
        def trigger_wait(self) -> None:
            raise AssertionError("waited for")

    class Sharded(torch.Tensor):
        pass

    tensor, sharded = torch.ones(2), torch.ones(2).as_subclass(Sharded)
    assert own_part(tensor) is tensor
    sharded._local_tensor = tensor
    assert own_part(sharded) is tensor
    sharded._local_tensor = tensor.as_subclass(OnItsWay)
    assert own_part(sharded) is None


def test_looking_at_tensors_of_a_plan_is_left_out():
    with torch._subclasses.FakeTensorMode(), nanhunt.trace() as hunt:
        (torch.ones(3) / 0).log_()
    report = hunt.report()
    assert (report.findings, report.skips) == ((), ())
