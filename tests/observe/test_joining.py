"""What the ranks have told each other becomes one report, and no store can hold it up."""

import threading
import time
from typing import Any

import pytest
import torch

from nanhunt.findings import ChainLink, Finding, Location
from nanhunt.observe import ranks
from nanhunt.observe.ranks import Entry, Heard, Ranks, joined, names
from nanhunt.records.ops import SourceLine


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
