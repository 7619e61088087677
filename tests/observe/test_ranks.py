"""Distributed runs: the first rank that goes non-finite is named on every rank, and nobody else is."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanhunt.capture.format import read_capture
from nanhunt.findings import ChainLink, Finding, Location
from nanhunt.observe import ranks
from nanhunt.observe.collectives import own_part
from nanhunt.observe.ranks import Entry, Heard, Ranks, joined, names
from nanhunt.records.ops import SourceLine

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
    prefix = "module." if name.startswith("ddp") else ""
    for rank in (0, 1):
        found = seen[rank][name]
        [finding] = found["findings"]
        assert (finding["code"], finding["phase"], finding["op"]) == ("NH701", "weights", "")
        assert (finding["module"], finding["tensor"]) == (f"{prefix}body.2", f"{prefix}body.2.weight")
        assert (finding["place"], finding["rank"]) == ([0, 0], 0)
        assert finding["notes"][-1] == "rank 1 found the same"


def test_a_nan_weight_in_the_shard_of_rank_1_is_found_there(seen: Seen):
    for rank in (0, 1):
        [finding] = seen[rank]["fsdp nan weight on rank 1"]["findings"]
        assert (finding["code"], finding["tensor"], finding["rank"]) == ("NH701", "body.2.weight", 1)
        assert finding["message"].startswith("parameter body.2.weight holds 1 NaN among 16 elements")


ALONE = {
    "ddp alone": ("backward", "c10d::allreduce_", "module.body.0.weight", "# mark: backward call"),
    "ddp bucket view alone": ("backward", "c10d::allreduce_", "module.body.0.weight", "# mark: backward call"),
    "ddp compressed alone": ("backward", "c10d::allreduce_", "module.body.0.weight", "# mark: backward call"),
    "reduced by hand alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: each"),
    "flat alone": ("backward", "c10d::allreduce_", "body.0.weight", "# mark: flat"),
    "fsdp alone": ("backward", "c10d::_reduce_scatter_base_", "body.2.weight", "# mark: backward call"),
    "fsdp nan weight alone": ("weights", "c10d::_allgather_base_", "", "# mark: forward"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_that_hears_nothing_blames_the_collective_and_no_operation_of_its_own(seen: Seen, name: str):
    phase, op, tensor, mark = ALONE[name]
    found = seen[0][name]
    [finding] = found["findings"]
    assert (finding["code"], finding["phase"], finding["op"], finding["tensor"]) == ("NH207", phase, op, tensor)
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


# Joining, without processes.


def entry(
    rank: int, step: int = 0, *, micro_step: int = 0, received: bool = False, op: str = "a", index: int = 0
) -> Entry:
    source = SourceLine("train.py", 3, "loss.backward()")
    location = Location("backward", op=op, source=source, step=step, micro_step=micro_step, rank=rank)
    finding = Finding("NH201", "non-finite-gradient", "error", "unknown", "unknown", "message", location)
    return Entry(rank, finding, received, index, (ChainLink(op, "1 of 2 elements"),))


def heard(*entries: Entry, world: int = 4, received: int = 0) -> Heard:
    return Heard(world, world, received, {str(number): entry for number, entry in enumerate(entries)})


def found(own: Entry | None, *others: Entry, received: int = 0) -> list[tuple[int, int | None]]:
    findings, _ = joined(own, heard(*others, received=received))
    return [(finding.location.rank, finding.location.step) for finding in findings]


def test_an_entry_is_the_same_after_it_was_written_and_read():
    evidence = {"num_nonfinite": 2, "value": float("inf"), "first_position": [0, 1]}
    made = entry(3, 7, micro_step=1, received=True, index=12)
    finding = Finding(**(vars(made.finding) | {"evidence": evidence, "notes": ("a", "b"), "help": ("c",)}))
    whole = Entry(3, finding, True, 12, made.chain)
    assert Entry.from_json(whole.to_json()) == whole
    bare = Entry(0, Finding(**(vars(made.finding) | {"location": Location("data")})))
    assert Entry.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("own", "other", "first"),
    [
        (entry(0, 3), entry(1, 2, op="b"), 1),
        (entry(0, 2, micro_step=1), entry(1, 2, op="b"), 1),
        (entry(0, 2, received=True), entry(1, 2, index=9), 1),
        (entry(0, 2, index=5), entry(1, 2, index=4, op="b"), 1),
        (entry(0, 2), entry(1, 2, op="b"), 0),
        (entry(0, 1, received=True), entry(1, 2), 0),
    ],
    ids=["earlier step", "earlier part", "made before received", "earlier operation", "lower rank", "arrived earlier"],
)
def test_the_first_of_all_ranks_comes_first(own: Entry, other: Entry, first: int):
    assert found(own, other)[0][0] == first
    assert found(other, own)[0][0] == first


def test_findings_of_their_own_follow_and_what_was_received_is_a_note():
    findings, chain = joined(entry(2, 1, received=True), heard(entry(3, 4, op="b"), entry(1, 1), received=6))
    assert [(finding.location.rank, finding.location.step) for finding in findings] == [(1, 1), (3, 4)]
    assert findings[0].notes == ("rank 2 and 5 more received non-finite values from another rank",)
    assert chain == (ChainLink("a", "1 of 2 elements"),)


def test_a_rank_without_a_finding_reports_that_of_another():
    assert found(None, entry(1, 1)) == [(1, 1)]
    assert found(None) == []


def test_ranks_that_did_not_answer_are_named():
    assert Heard(4, 4).reason == ""
    assert Heard(4, 3, missing=(2,)).reason == "rank 2 has not answered"
    assert Heard(4, 2, missing=(2, 3), problem="gone").reason == "ranks 2 and 3 have not answered: gone"
    assert Heard(4, 2).reason == "2 ranks have not answered"
    assert names(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more"


def test_outside_of_distributed_runs_nothing_is_waited_for():
    alone = Ranks(60.0)
    alone.begin()
    alone.publish(entry(0))
    assert alone.heard() == Heard()


class DeadStore:
    """A store whose server has stopped: whoever asks waits for ever."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.released.wait()


def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(monkeypatch):
    store = DeadStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    talking = Ranks(0.2)
    talking.begin()
    start = time.monotonic()
    talking.publish(entry(0))
    assert talking.heard().reason == "1 rank has not answered"
    assert time.monotonic() - start < 2.0
    store.released.set()


def test_a_store_that_fails_is_a_reason_and_no_error(monkeypatch):
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Connection reset by peer\nmore")

    monkeypatch.setattr(ranks, "_store", Broken)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    talking = Ranks(5.0)
    talking.begin()
    talking.publish(None)
    assert talking.heard().reason == "2 ranks have not answered: Connection reset by peer"


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
    import nanhunt

    with torch._subclasses.FakeTensorMode(), nanhunt.trace() as hunt:
        (torch.ones(3) / 0).log_()
    report = hunt.report()
    assert (report.findings, report.skips) == ((), ())
