"""What the processes of a distributed run tell each other: on which of them the first fault was found.

NOTE on how they talk, and that nobody waits for long.

1. At the end of the traced block a rank leaves its first finding in the store of the default process group, the table
   by which the processes found each other. No collective runs, for a rank that has crashed would never join it.
2. All talk with the store happens in a thread that is left behind if it gets stuck: the process that serves the store
   may have been stopped. The report waits for it for a bounded time only.
3. The thread lets go of the store when the process group is gone: whoever keeps the store of a destroyed group keeps
   its port, and the next group would find the old addresses in it.
4. Answers are counted by the store, and only findings are read one by one, so that a healthy run of many ranks costs
   each of them a few requests.
5. Which traced blocks of two processes belong together is told by the line they stand at and by how often it ran.
6. A rank that has found something gives the others a moment before it goes on, for the program may destroy the process
   group at once.
"""

import atexit
import json
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanhunt.errors import first_line
from nanhunt.findings import ChainLink, Finding, Location
from nanhunt.numerics import count
from nanhunt.observe.source import user_frame
from nanhunt.records.ops import SourceLine

MAX_ENTRIES = 16
"""Findings read of those that ranks made themselves, and of those that they received."""

MAX_NAMED = 64
"""Ranks that are looked for by number where some have not answered."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1
_PUBLISHED_WITHIN_S = _ANSWERED_WITHIN_S = 0.5
_EXIT_WITHIN_S = 1.0

_hunts: Counter[str] = Counter()
_talks: "weakref.WeakSet[_Talk]" = weakref.WeakSet()


@dataclass(frozen=True)
class Entry:
    """The first finding of one rank.

    Attributes:
        rank: The rank.
        finding: What it found.
        is_received: Whether the values came from another rank.
        index: Position in the rank's program order.
        chain: From its offender to its sinks.
    """

    rank: int
    finding: Finding
    is_received: bool = False
    index: int = 0
    chain: tuple[ChainLink, ...] = ()

    @property
    def order(self) -> tuple[int, int, bool, int, int]:
        """Sorts the entries of all ranks; in the same part of a step, a fault goes before its arrival elsewhere."""
        where = self.finding.location
        return where.step or 0, where.micro_step, self.is_received, self.index, self.rank

    def to_json(self) -> str:
        """The entry as text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Entry":
        """The entry that another rank wrote."""
        data = json.loads(text)
        finding = data["finding"]
        where = finding["location"]
        source = SourceLine(**where["source"]) if where["source"] is not None else None
        finding |= {"location": Location(**(where | {"source": source}))}
        finding |= {name: tuple(finding[name]) for name in ("notes", "help")}
        chain = tuple(ChainLink(**link) for link in data["chain"])
        return cls(data["rank"], Finding(**finding), data["is_received"], data["index"], chain)


@dataclass
class Heard:
    """What is known of the other ranks.

    Attributes:
        world: Number of ranks.
        num_answered: Ranks that have answered, this one included.
        num_received: Ranks that only received what another had made.
        entries: Findings of the other ranks, as far as they were read.
        missing: Ranks that have not answered, as far as they were looked for.
        problem: Why nothing more is known.
    """

    world: int = 1
    num_answered: int = 1
    num_received: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    problem: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether every rank has answered."""
        return self.num_answered >= self.world

    @property
    def reason(self) -> str:
        """Who has not answered, and why; empty if all have."""
        if self.is_complete:
            return ""
        who = names(self.missing) if self.missing else count(self.world - self.num_answered, "rank")
        verb = "has" if self.world - self.num_answered == 1 else "have"
        return f"{who} {verb} not answered" + (f": {self.problem}" if self.problem else "")


class Ranks:
    """The other processes of the run; alone outside distributed runs.

    Args:
        timeout_s: How long a report waits for them, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._site = ""
        self._talk: _Talk | None = None
        self._was_distributed = False
        self._has_waited = False

    def begin(self) -> None:
        """The traced block begins; the user's line is the one it stands at."""
        file, line, _ = user_frame() or ("", 0, "")
        self._site = f"{Path(file).name}:{line}"
        self._was_distributed = _store() is not None

    @property
    def is_distributed(self) -> bool:
        """Whether there is anybody to talk to."""
        return _store() is not None

    def publish(self, entry: Entry | None) -> None:
        """Tells the others what this rank has found, or that it has found nothing."""
        store = _store()
        if store is not None:
            self._has_waited = False
            self._talk = _Talk(store, f"nanhunt/{self._site}/{_hunts[self._site]}", entry)
            _hunts[self._site] += 1
            self._talk.start(self._timeout_s)
            self._talk.is_published.wait(min(self._timeout_s, _PUBLISHED_WITHIN_S))
            if entry is not None:
                self._talk.ended.wait(min(self._timeout_s, _ANSWERED_WITHIN_S))

    def heard(self) -> Heard:
        """What the others have found; waits for them for the timeout, and a second time for next to nothing."""
        if self._talk is None:
            gone = "the process group was destroyed inside the traced block"
            return Heard(world=2, problem=gone) if self._was_distributed else Heard()
        timeout_s = _LONGEST_PAUSE_S if self._has_waited else self._timeout_s
        self._has_waited = True
        return self._talk.listen(timeout_s)


class _Talk:
    """One exchange over the store, in a thread of its own."""

    def __init__(self, store: Any, prefix: str, entry: Entry | None) -> None:
        distributed = torch.distributed
        self.rank, self.heard = distributed.get_rank(), Heard(world=distributed.get_world_size())
        self.is_published = threading.Event()
        self._store: Any = store
        self._prefix, self._entry = prefix, entry
        self._stop, self.ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout_s: float) -> None:
        """Begins, or begins again where not all have answered yet."""
        store, self._store = self._store, None
        self.ended.clear()
        # A daemon, for it must not keep the process from ending; it is stopped before the interpreter is taken down.
        self._thread = threading.Thread(target=self._run, args=(store, timeout_s), name="nanhunt-ranks", daemon=True)
        _talks.add(self)
        self._thread.start()

    def listen(self, timeout_s: float) -> Heard:
        """What is known now, or as soon as all have answered, at most this much later."""
        if self.ended.is_set() and not self.heard.is_complete and not self.heard.problem:
            self._store = _store()
            if self._store is not None:
                self.start(timeout_s)
        self.ended.wait(timeout_s + _LONGEST_PAUSE_S)
        return replace(self.heard, entries=dict(self.heard.entries))

    def stop(self) -> None:
        """Ends it, if it is not stuck."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_EXIT_WITHIN_S)

    def _run(self, store: Any, timeout_s: float) -> None:
        deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        try:
            if not self.is_published.is_set():
                self._publish(store)
                self.is_published.set()
            while not self._stop.is_set():
                self._read(store)
                if self.heard.is_complete or time.monotonic() >= deadline:
                    break
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                if _store() is not store:
                    self.heard.problem = "the process group was destroyed before"
                    if self.heard.num_answered <= 1:
                        self.heard.missing = tuple(other for other in range(self.heard.world) if other != self.rank)
                    return
            self._look_for_missing(store)
        except Exception as error:  # noqa: BLE001 - a store fails in as many ways as there are stores
            self.heard.problem = first_line(error)
        finally:
            self.ended.set()

    def _publish(self, store: Any) -> None:
        if self._entry is not None:
            kind = _kind(self._entry)
            number = store.add(f"{self._prefix}/num_{kind}", 1) - 1
            if number < MAX_ENTRIES:
                store.set(f"{self._prefix}/{kind}/{number}", self._entry.to_json())
        store.set(f"{self._prefix}/rank{self.rank}", "answered")
        store.add(f"{self._prefix}/num_answered", 1)

    def _read(self, store: Any) -> None:
        # Adding nothing reads a counter. The answers are read first: who has answered has written all the rest before.
        num_answered = store.add(f"{self._prefix}/num_answered", 0)
        for kind in ("made", "received"):
            number = store.add(f"{self._prefix}/num_{kind}", 0)
            if kind == "received":
                self.heard.num_received = number
            for position in range(min(number, MAX_ENTRIES)):
                key = f"{self._prefix}/{kind}/{position}"
                if key not in self.heard.entries and store.check([key]):
                    self.heard.entries[key] = Entry.from_json(store.get(key).decode())
        self.heard.num_answered = num_answered

    def _look_for_missing(self, store: Any) -> None:
        if self.heard.is_complete:
            return
        ranks = range(min(self.heard.world, MAX_NAMED))
        self.heard.missing = tuple(rank for rank in ranks if not store.check([f"{self._prefix}/rank{rank}"]))


def rank() -> int:
    """The process's number in a distributed run; 0 outside."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def is_alone() -> bool:
    """Whether no other process takes part in the run."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def joined(own: Entry | None, heard: Heard) -> tuple[list[Finding], tuple[ChainLink, ...]]:
    """The findings of all ranks, the first offender of all first, and the chain of that one.

    Ranks that received what another rank made, and those that found the very same, are notes of the first finding.
    """
    others = [entry for entry in heard.entries.values() if own is None or entry.rank != own.rank]
    entries = sorted([*others, *([own] if own is not None else [])], key=lambda entry: entry.order)
    if not entries:
        return [], ()
    first, rest = entries[0], entries[1:]
    same = [entry.rank for entry in rest if _what(entry) == _what(first) and not entry.is_received]
    received = [entry.rank for entry in rest if entry.is_received]
    notes = [f"{names(same)} found the same"] if same else []
    if received:
        more = heard.num_received - len(received) - first.is_received
        who = f"{names(received)} and {more:,} more" if more > 0 else names(received)
        notes.append(f"{who} received non-finite values from another rank")
    later = [entry.finding for entry in rest if not entry.is_received and entry.rank not in same]
    return [replace(first.finding, notes=(*first.finding.notes, *notes)), *later], first.chain


def names(ranks: Iterable[int]) -> str:
    """``rank 1``; ``ranks 1, 2 and 5``; of many the first ten."""
    listed = sorted(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    shown = [str(rank) for rank in listed[:10]]
    last = f"{len(listed) - 10:,} more" if len(listed) > 10 else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"


def _what(entry: Entry) -> Sequence[Any]:
    where = entry.finding.location
    return entry.finding.code, where.phase, where.op, where.module, where.tensor, where.source, where.step


def _kind(entry: Entry) -> str:
    return "received" if entry.is_received else "made"


def _store() -> Any:
    """The store of the default process group; None where there is no other process to talk to."""
    if is_alone() or torch.distributed.get_backend() == "fake":
        return None
    return torch.distributed.distributed_c10d._get_default_store()


@atexit.register
def _stop_talking() -> None:
    for talk in list(_talks):
        talk.stop()
