"""What was written down of a traced loop: records, sources, sinks, and in which step each of them stands."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from nanhunt.observe.call import Call, Here, Places
from nanhunt.records.ops import OpRecord, Sink, StateSource, Trace

MAX_RECORDS = 20_000
"""Records kept; more are counted. A step that is wholly NaN propagates through every one of its operations."""


class Journal:
    """The records of a loop so far.

    Args:
        places: Says where the running operation stands; asked only when something is written down.

    Attributes:
        step: Optimizer step, from 0.
        micro_step: Part of an accumulated step.
        records: Operations, in program order.
        sources: Tensors that were non-finite from the start.
        sinks: Harmed places.
        num_dropped: Records beyond the bound.
        skipped: Kinds of tensors that could not be looked at.
        by_hand: Births that reached state or gradients before anything else, so that their operations, if they stand
            between a backward and the next forward pass, are an update.
    """

    def __init__(self, places: Places) -> None:
        self.step = self.micro_step = 0
        self.records: list[OpRecord] = []
        self.sources: list[StateSource] = []
        self.sinks: list[Sink] = []
        self.num_dropped = 0
        self.skipped: Counter[str] = Counter()
        self.by_hand: set[int] = set()
        self._places = places
        self._prepared: set[int] = set()
        self._settled: set[int] = set()

    def trace(self, num_ops: int, problems: Iterable[str]) -> Trace:
        """The records so far."""
        return Trace(
            num_ops=num_ops,
            ops=tuple(map(self._placed, self.records)),
            sources=tuple(self.sources),
            sinks=tuple(self.sinks),
            num_dropped=self.num_dropped,
            skipped=tuple(self.skipped.items()),
            problems=tuple(problems),
        )

    def _placed(self, record: OpRecord) -> OpRecord:
        """What stands between a backward and the next forward pass is an update by hand, if state is where it went."""
        if not record.between or record.index not in self.by_hand:
            return record
        return replace(record, phase="optimizer", step=record.step - (record.between == "after the step"))

    def settle(self) -> None:
        """The forward pass of the running part begins: what was prepared so far belongs to it."""
        self._prepared.clear()
        self._settled = {record.index for record in self.records}

    def begin_part(self) -> None:
        """The next part of an accumulated step begins; what was prepared for it belongs to it."""
        here = self.step, self.micro_step
        self.micro_step += 1
        for index in self._prepared:
            self.sources[-1 - index] = replace(self.sources[-1 - index], micro_step=self.micro_step)
        self._prepared.clear()
        self.records = [
            replace(r, micro_step=self.micro_step)
            if r.between and (r.step, r.micro_step) == here and r.index not in self.by_hand | self._settled
            else r
            for r in self.records
        ]

    def count_as_step(self) -> None:
        """What was taken for another part of the last step is the next step."""
        here = self.step, self.micro_step
        self.step, self.micro_step = self.step + 1, 0
        self.records = [
            replace(r, step=self.step, micro_step=0) if (r.step, r.micro_step) == here else r for r in self.records
        ]

    def _record(self, call: Call, kind: Any, facts: tuple[Any, ...], here: Here, *, deliberate: bool = False) -> None:
        # What only passes on leaves room for a birth that comes late.
        if len(self.records) >= (MAX_RECORDS if kind == "birth" else MAX_RECORDS // 2):
            self.num_dropped += 1
            return
        self.records.append(
            OpRecord(
                index=call.index,
                op=call.traits.full_name,
                kind=kind,
                deliberate=deliberate,
                outputs=facts,
                ingredients=tuple(sorted(call.taint)),
                step=self.step,
                micro_step=self.micro_step,
                **here._asdict(),
            )
        )
