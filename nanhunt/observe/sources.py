"""What was non-finite before any traced operation wrote it: found at its first use, or looked at between operations."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from nanhunt.observe.call import Call, Here, Origin, Places
from nanhunt.observe.collectives import origin_of_received
from nanhunt.observe.finite import first_nonfinite, is_finite, nonfinite_kinds, unreadable_kind, value_facts
from nanhunt.observe.journal import Journal
from nanhunt.observe.memory import NO_BIRTHS, Memory, storage_key
from nanhunt.observe.origins import looks_like_log_table, looks_like_mask, spread_of
from nanhunt.observe.written_over import ONLY_MOVE, was_nonfinite_before
from nanhunt.records.ops import SourceLine, StateSource

STATE = ("buffer", "parameter", "optimizer state")

# Their values are seen where the inner operations, or the first forward pass, make them.
_SEEN_LATER = ("tensor of torch.func", "lazy parameter")


class Sources(Journal):
    """Finds and writes down tensors that were non-finite from the start.

    Args:
        places: Says where the running operation stands; asked only when something is written down.
        origin: Says what a tensor is that no traced operation wrote.

    Attributes:
        memory: The storages that may hold non-finite values.
    """

    def __init__(self, places: Places, origin: Callable[[Tensor], Origin]) -> None:
        super().__init__(places)
        self.memory = Memory()
        self._origin = origin
        self._unused: set[int] = set()
        self._first_reads: dict[int, tuple[SourceLine | None, int, int]] = {}
        self._deliberate: set[int] = set()
        self._log_masks: set[int] = set()

    def _note_use(self, call: Call, *, is_harmful: bool) -> None:
        """What was non-finite before the step does harm where it is read.

        An optimizer reads all of a table of which the model reads a row; the first read by the model says more then.
        """
        used = call.taint & self._unused
        if not used:
            return
        here = self._places.here()
        for index in used:
            first = self._first_reads.setdefault(index, (here.source, self.step, self.micro_step))
            now = first if here.phase == "optimizer" else (here.source, self.step, self.micro_step)
            if is_harmful:
                source, step, micro_step = now
                self.sources[-1 - index] = replace(
                    self.sources[-1 - index], source=source, step=step, micro_step=micro_step
                )
        if is_harmful:
            self._unused -= used

    # At an operation.

    def _find_unseen_sources(self, call: Call, bad: Sequence[Tensor], *, makes_nan: bool) -> bool:
        """Whether an input holds non-finite values that no traced operation wrote, and that explain the result."""
        overwritten = {storage_key(tensor) for tensor in call.written}
        seen = call.taint
        unknown = [
            tensor
            for tensor in call.inputs
            if not unreadable_kind(tensor) and storage_key(tensor) not in self.memory.tainted
        ]
        for tensor in unknown:
            if storage_key(tensor) not in overwritten and not is_finite(tensor):
                self._add_found(call, tensor, *nonfinite_kinds(tensor))
        # The operation has destroyed the evidence of what it has written over; what is left of it may still tell.
        is_explained = call.taint != seen and (call.saw_nan or not makes_nan)
        for tensor in unknown:
            if storage_key(tensor) in overwritten and not is_explained and self._was_bad(call, tensor, makes_nan):
                self._add_found(call, tensor, *nonfinite_kinds(tensor))
        if call.taint == seen:
            return False
        return call.saw_nan if makes_nan else True

    def _was_bad(self, call: Call, tensor: Tensor, makes_nan: bool) -> bool:
        """Whether what was written over was non-finite before.

        A sum or product of finite numbers may overflow, where the memory is known to have been finite.
        """
        name = call.traits.name
        if not makes_nan and name not in ONLY_MOVE and self.memory.is_known_finite(tensor):
            return False
        return was_nonfinite_before(name, tensor, call.args, call.kwargs, makes_nan=makes_nan)

    def _add_found(self, call: Call, tensor: Tensor, has_nan: bool, has_inf: bool) -> None:
        """A source that is met at its first use."""
        here = self._places.here()
        op = ""
        unwritten = self._unwritten(tensor)
        key = storage_key(tensor)
        if unwritten is not None:
            phase = here.phase
            origin, here, op = unwritten
            origin = origin._replace(phase=phase if phase == "backward" else None)
        elif key in self.memory.received:
            site = self.memory.received[key][1]
            origin, op = origin_of_received(site, call.traits.full_name), site.op
            here = self._places.seen_from(site)
        else:
            origin = self._origin(tensor)
            if call.traits.name == "copy_" and call.written and tensor is not call.written[0]:
                # Loading a checkpoint: what the values are is told by where they go.
                target = self._origin(call.written[0])
                origin = target if target.kind in STATE else origin
        births = self._add_source(origin, tensor, here, call.index, op)
        if here.between:
            self._prepared |= births
        if call.traits.renames:
            # Numbers that have just become a tensor: their first use is still to come.
            self._unused |= births
        call.taint |= births
        call.saw_nan |= has_nan
        call.saw_inf |= has_inf

    def _unwritten(self, tensor: Tensor) -> tuple[Origin, Here, str] | None:
        """What is to be said of memory that was not yet written from end to end: where it was made, and by what."""
        noted = self.memory.unwritten.get(storage_key(tensor))
        if noted is None:
            return None
        site = noted[1]
        return Origin("uninitialised memory", module=site.module), self._places.seen_from(site), site.op

    # Between the operations.

    def declare(self, origin: Origin, tensor: Tensor, here: Here | None = None, found_at: int = -1) -> None:
        """Looks at a tensor that exists before the step; a non-finite one becomes a source."""
        reason = unreadable_kind(tensor)
        if reason is not None:
            if reason not in _SEEN_LATER:
                self.skipped[reason] += 1
        elif not is_finite(tensor) and not self.memory.births_of(tensor):
            unwritten, op = self._unwritten(tensor), ""
            if unwritten is not None:
                made, here_made, op = unwritten
                origin, here = (made, here_made) if origin.kind == "batch" else (origin, here)
            births = self._add_source(origin, tensor, here, found_at, op)
            if origin.kind != "uninitialised memory":
                self._unused |= births

    def note_no_samples(self, tensor: Tensor) -> None:
        """Notes that the first dimension of a tensor that was declared is not, or may not be, that of the samples."""
        for index in self.memory.births_of(tensor):
            if index < 0:
                self.sources[-1 - index] = replace(self.sources[-1 - index], spread=None)

    def declare_received(self, tensor: Tensor) -> None:
        """Looks at a tensor that a collective may have written, now that it must have ended."""
        site = self.memory.received_at(tensor)
        if site is not None and not self.memory.births_of(tensor) and not is_finite(tensor):
            here = self._places.seen_from(site)
            self._add_source(origin_of_received(site, ""), tensor, here, site.index, site.op)

    def declare_result(self, origin: Origin, tensor: Tensor, causes: Iterable[Tensor]) -> None:
        """Looks at a tensor that something outside the trace computed from traced tensors."""
        births = NO_BIRTHS.union(*(self.memory.births_of(cause) for cause in causes if not is_finite(cause)))
        births -= self._deliberate
        if not births:
            self.declare(origin, tensor)
        elif not is_finite(tensor):
            self.memory.taint(tensor, births)

    def _add_source(
        self, origin: Origin, tensor: Tensor, here: Here | None, found_at: int, op: str = ""
    ) -> frozenset[int]:
        index, facts = -1 - len(self.sources), value_facts(tensor)
        is_mask = looks_like_mask(origin, facts)
        is_table = not is_mask and looks_like_log_table(origin, facts)
        source = StateSource(
            index,
            origin.kind,
            origin.name,
            facts,
            first_nonfinite(tensor),
            module=origin.module,
            source=here.source if here is not None else None,
            op=op,
            found_at=found_at,
            deliberate=is_mask,
            step=self.step,
            micro_step=self.micro_step,
            phase=origin.phase,
            spread=spread_of(tensor) if origin.kind == "batch" and not is_table else None,
        )
        self.sources.append(source)
        births = frozenset({index})
        state = self.memory.taint(tensor, births)
        state.own |= births
        if is_mask:
            self._deliberate.add(index)
        elif is_table:
            self._log_masks.add(index)
        return births
