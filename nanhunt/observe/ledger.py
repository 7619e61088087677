"""What is known of every non-finite value of a traced step: where it was born, where it went, what it reached.

NOTE on how a fault is followed.

1. Memory, not Python objects, carries a value: autograd unpacks a saved tensor as a new object, views and in-place
   operations share memory. State is therefore kept per storage, held by a weak reference so that an address is never
   taken for another's.
2. A storage is *tainted* with the indices of the births whose non-finite values it may hold. A read of a tainted
   storage looks at the view that is really read; only then do the births travel on.
3. An operation whose inputs are all untainted needs one look, at its output, and not even that if it can only move or
   bound what it is given. A non-finite output is then a birth, unless an input turns out to be non-finite that no
   traced operation wrote: that is a source.
4. Memory from ``empty`` holds anything until it is written, and is not looked at before.
5. A deliberate value (a -inf mask) that an operation turns into NaN is that operation's ingredient: what travels on is
   the operation's own birth.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nanhunt.observe.call import Call, Here, Origin, Places
from nanhunt.observe.collectives import ends_collective, note_received, origin_of_received, sent
from nanhunt.observe.finite import (
    can_hold_nonfinite,
    first_nonfinite,
    is_finite,
    nonfinite_kinds,
    unreadable_kind,
    value_facts,
)
from nanhunt.observe.journal import Journal
from nanhunt.observe.memory import NO_BIRTHS, Memory, storage_key
from nanhunt.observe.op_info import OpTraits, has_nonfinite_number, is_deliberate, is_log_of_mask, tensors_in, written
from nanhunt.observe.origins import looks_like_mask, spread_of
from nanhunt.observe.written_over import was_nonfinite_before
from nanhunt.records.ops import OpRecord, Sink, SourceLine, StateSource, ValueFacts

# Their values are seen where the inner operations, or the first forward pass, make them.
_SEEN_LATER = ("tensor of torch.func", "lazy parameter")
_STATE = ("buffer", "parameter", "optimizer state")


class Ledger(Journal):
    """Follows non-finite values through the operations it is shown.

    Args:
        places: Says where the running operation stands; asked only when something is written down.
        origin: Says what a tensor is that no traced operation wrote.

    Attributes:
        memory: The storages that may hold non-finite values.
        read_numbers: The non-finite loss that was last read as a number; who reads it may end the step over it.
        held: Sinks that count only if a ``GradScaler`` does not get over them.
        is_scaling: Whether the loss is just being multiplied by its scale.
        is_scaled: Whether it was, in this step.
        scaling: Births of that multiplication.
        fed: Births that a model was given as its input.
        sent: What collectives were given to carry to other processes since somebody looked.
    """

    def __init__(self, places: Places, origin: Callable[[Tensor], Origin]) -> None:
        super().__init__(places)
        self.memory = Memory()
        self.read_numbers: dict[str, Sink] = {}
        self.held: list[Sink] = []
        self.is_scaling = self.is_scaled = False
        self.scaling: set[int] = set()
        self.fed: set[int] = set()
        self.sent: list[Sink] = []
        self._origin = origin
        self._numbers: frozenset[int] = NO_BIRTHS
        self._unused: set[int] = set()
        self._first_reads: dict[int, tuple[SourceLine | None, int, int]] = {}
        self._deliberate: set[int] = set()
        self._log_masks: set[int] = set()

    # Before and after an operation.

    def before(self, index: int, traits: OpTraits, args: Any, kwargs: Any) -> Call:
        """Looks at those inputs whose memory is tainted."""
        inputs = tensors_in(*args, *kwargs.values())
        call = Call(index, traits, args, kwargs, inputs, written(traits, args, kwargs))
        unread = {id(tensor) for tensor in call.written} if traits.overwrites else set()
        tainted = self.memory.tainted
        for tensor in inputs:
            state = tainted.get(storage_key(tensor)) if tainted else None
            if state is not None and id(tensor) not in unread:
                self._read_tainted(call, tensor, state.births)
        if traits.is_collective and call.taint - self._deliberate:
            self.sent.append(sent(call, call.taint - self._deliberate))
        return call

    def _read_tainted(self, call: Call, tensor: Tensor, births: frozenset[int]) -> None:
        """Rule 2: only the view that is really read counts."""
        has_nan, has_inf = (False, False) if unreadable_kind(tensor) else nonfinite_kinds(tensor)
        if not (has_nan or has_inf):
            return
        call.taint |= births
        call.saw_nan |= has_nan
        call.saw_inf |= has_inf
        if call.traits.name == "_local_scalar_dense":
            self._numbers = births - self._deliberate
        if tensor.requires_grad and tensor.numel() == 1 and not births <= self._deliberate:
            # Perhaps the loss; who reads it as a number may end the step over it.
            self.read_numbers["loss"] = Sink("loss", "loss", value_facts(tensor), tuple(sorted(births)))

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

    def after(self, call: Call, output: Any) -> bool:
        """Looks at the results; tells whether a non-finite value was found among them."""
        produced = tensors_in(output)
        input_keys = {storage_key(tensor) for tensor in call.inputs}
        shown = {id(tensor) for tensor in call.written}
        is_new = call.traits.renames
        fresh = [t for t in produced if id(t) not in shown and (is_new or storage_key(t) not in input_keys)]
        results = [*fresh, *call.written]
        if call.traits.is_uninitialised:
            for tensor in results:
                self.memory.note_unwritten(tensor, self._places.site(call.index, call.traits))
            return False
        if call.traits.is_collective:
            note_received(self.memory, call, produced, self._places.site(call.index, call.traits))
            return False
        if ends_collective(self.memory, call):
            return False
        if call.traits.name == "all_gather_copy_in":
            # The first result is the piece it has written to; the rest of that memory is still to come.
            results = produced[:1]
        bad = [tensor for tensor in results if self._is_bad_result(call, tensor)]
        if bad:
            self._record_nonfinite(call, bad)
        elif fresh and not call.taint <= self._deliberate:
            self._note_use(call, is_harmful=False)
            self._record(call, "kill", (), self._places.here())
        return bool(bad)

    def _is_bad_result(self, call: Call, tensor: Tensor) -> bool:
        """Whether the result is non-finite; memory that is overwritten by finite values is clean again."""
        reason = unreadable_kind(tensor)
        if reason is not None:
            self.skipped[reason] += 1
            return False
        if call.written and self.memory.unwritten:
            self.memory.note_written(tensor)
        if not can_hold_nonfinite(tensor):
            if call.taint and "linalg" in call.traits.name:
                # The error codes of a decomposition: read again only where an operation refuses it.
                self.memory.taint(tensor, call.taint)
            return False
        if is_finite(tensor):
            self.memory.clean(tensor)
            return False
        return True

    def _record_nonfinite(self, call: Call, bad: Sequence[Tensor]) -> None:
        self._note_use(call, is_harmful=True)
        makes_nan = any(nonfinite_kinds(tensor)[0] for tensor in bad)
        explained = call.saw_nan if makes_nan else (call.saw_nan or call.saw_inf)
        is_constant = is_deliberate(call.traits.name, call.args, call.kwargs, bad, makes_nan=makes_nan)
        if not explained and not (is_constant and call.traits.renames):
            explained = self._find_unseen_sources(call, bad, makes_nan=makes_nan)
        if not explained and self._numbers and has_nonfinite_number(call.args, call.kwargs):
            # A number that was read from a tensor has come back.
            call.taint |= self._numbers
            explained = True
        if explained and call.taint <= self._deliberate:
            # A mask on its way: of no interest unless somebody trips over it.
            for tensor in bad:
                self.memory.taint(tensor, call.taint)
            return
        here = self._places.here()
        # A learning rate of infinity is no mask.
        deliberate = here.phase != "optimizer" and is_constant
        if self.is_scaling and not explained:
            self.scaling.add(call.index)
        births = call.taint if explained else self._births_with(call, makes_nan=makes_nan)
        if not explained and deliberate:
            self._deliberate.add(call.index)
        elif not explained and is_log_of_mask(call.traits.name, call.args):
            self._log_masks.add(call.index)
        for tensor in bad:
            self.memory.taint(tensor, births)
        # Counting takes ten times as long as looking, and after a fault nearly every operation propagates.
        facts = () if explained or deliberate else tuple(value_facts(tensor) for tensor in bad)
        self._record(call, "propagate" if explained else "birth", facts, here, deliberate=deliberate)

    def _births_with(self, call: Call, *, makes_nan: bool) -> frozenset[int]:
        """The births that travel on from a birth (rule 5 of the NOTE)."""
        ingredients: set[int] = set()
        if makes_nan:
            ingredients |= self._deliberate
            if "softmax" in call.traits.name or "attention" in call.traits.name:
                ingredients |= self._log_masks
        return (call.taint - ingredients) | {call.index}

    def _find_unseen_sources(self, call: Call, bad: Sequence[Tensor], *, makes_nan: bool) -> bool:
        """Whether an input holds non-finite values that no traced operation wrote, and that explain the result."""
        overwritten = {storage_key(tensor) for tensor in call.written}
        seen = call.taint
        for tensor in call.inputs:
            key = storage_key(tensor)
            if key in self.memory.tainted or unreadable_kind(tensor):
                continue
            if key in overwritten:
                # The operation has destroyed the evidence; what is left of it may still tell.
                if was_nonfinite_before(call.traits.name, tensor, call.args, call.kwargs, makes_nan=makes_nan):
                    self._add_found(call, tensor, *nonfinite_kinds(tensor))
            elif not is_finite(tensor):
                self._add_found(call, tensor, *nonfinite_kinds(tensor))
        if call.taint == seen:
            return False
        return call.saw_nan if makes_nan else True

    def _add_found(self, call: Call, tensor: Tensor, has_nan: bool, has_inf: bool) -> None:
        """A source that is met at its first use."""
        key = storage_key(tensor)
        here = self._places.here()
        op = ""
        if key in self.memory.unwritten:
            site = self.memory.unwritten[key][1]
            origin, op = Origin("uninitialised memory", module=site.module), site.op
            here = self._places.seen_from(site)
        elif key in self.memory.received:
            site = self.memory.received[key][1]
            origin, op = origin_of_received(site, call.traits.full_name), site.op
            here = self._places.seen_from(site)
        else:
            origin = self._origin(tensor)
            if call.traits.name == "copy_" and call.written and tensor is not call.written[0]:
                # Loading a checkpoint: what the values are is told by where they go.
                target = self._origin(call.written[0])
                origin = target if target.kind in _STATE else origin
        births = self._add_source(origin, tensor, here, call.index, op)
        if here.between:
            self._prepared |= births
        if call.traits.renames:
            # Numbers that have just become a tensor: their first use is still to come.
            self._unused |= births
        call.taint |= births
        call.saw_nan |= has_nan
        call.saw_inf |= has_inf

    # What is looked at between the operations.

    def declare(self, origin: Origin, tensor: Tensor, here: Here | None = None, found_at: int = -1) -> None:
        """Looks at a tensor that exists before the step; a non-finite one becomes a source."""
        reason = unreadable_kind(tensor)
        if reason is not None:
            if reason not in _SEEN_LATER:
                self.skipped[reason] += 1
        elif not is_finite(tensor) and not self.memory.births_of(tensor):
            self._unused |= self._add_source(origin, tensor, here, found_at)

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
            spread=spread_of(tensor) if origin.kind == "batch" else None,
        )
        self.sources.append(source)
        births = frozenset({index})
        state = self.memory.taint(tensor, births)
        state.own |= births
        if is_mask:
            self._deliberate.add(index)
        return births

    def reached(self, kind: Any, name: str, tensor: Tensor) -> bool:
        """Looks at a place where a non-finite value does harm, and notes which births arrived there.

        State that still is what it was before the step (a -inf mask, a lowest loss that starts at inf, a weight that
        nothing used) is no harm, nor is a mask in a buffer or an output.
        """
        if unreadable_kind(tensor) or is_finite(tensor):
            return False
        state = self.memory.find(tensor)
        births = state.births if state is not None else NO_BIRTHS
        if births:
            births -= self._deliberate if kind in ("buffer", "output") else NO_BIRTHS
            births -= state.own if state is not None and kind in _STATE else NO_BIRTHS
            if not births:
                return False
        if kind in _STATE or kind == "output":
            self.by_hand |= births - {birth for sink in self.sinks for birth in sink.births} - self.fed
        self.sinks.append(Sink(kind, name, value_facts(tensor), tuple(sorted(births))))
        return True

    def reached_by_error(self, kind: Any, error: BaseException) -> None:
        """The loop ended in an error: what was born in the same step and is still there is taken for the reason."""
        alive = {birth for state in self.memory.tainted.values() for birth in state.births} - self._deliberate
        births = {
            record.index
            for record in self.records
            if record.kind == "birth" and record.index in alive and record.step == self.step
        }
        births |= {source.index for source in self.sources if source.index in alive and source.step == self.step}
        if births and not self.sinks:
            name = f"{type(error).__name__} was raised"
            self.sinks.append(Sink(kind, name, ValueFacts((), ""), tuple(sorted(births))))

    def refused(self, call: Call) -> bool:
        """An operation that raises over the values it was given is where their births did harm, if there are any."""
        births = call.taint
        for tensor in call.inputs:
            known = self.memory.births_of(tensor)
            if not known and unreadable_kind(tensor) is None and not is_finite(tensor):
                self._add_found(call, tensor, *nonfinite_kinds(tensor))
                births |= call.taint
            births |= known
        if births:
            bad = next((tensor for tensor in call.inputs if not is_finite(tensor)), call.inputs[0])
            name = f"refused by {call.traits.full_name}"
            self.sinks.append(Sink("output", name, value_facts(bad), tuple(sorted(births))))
        return bool(births)

    def end_in_refusal(self, record: OpRecord) -> None:
        """The loop has ended over a finite matrix that was refused."""
        self.records.append(record)
        self.sinks.append(Sink("output", f"refused by {record.op}", ValueFacts((), ""), (record.index,)))

    @property
    def is_suspicious(self) -> bool:
        """Whether any memory may hold more than masks."""
        return any(not state.births <= self._deliberate for state in self.memory.tainted.values())

    @property
    def has_fault(self) -> bool:
        """Whether anything but a mask reached a sink."""
        return any(not set(sink.births) <= self._deliberate for sink in self.sinks)

    def forget_past(self) -> None:
        """Drops what can no longer reach a sink: records of births that are gone, and of what only passed on."""
        self.memory.purge()
        alive = {birth for state in self.memory.tainted.values() for birth in state.births}
        alive |= self._numbers | {birth for sink in (*self.sinks, *self.held) for birth in sink.births}
        for record in reversed(self.records):
            if record.index in alive:
                alive.update(record.ingredients)
        self.records = [record for record in self.records if record.kind == "birth" and record.index in alive]
        self._deliberate &= alive
        self._log_masks &= alive
        self.scaling &= alive
        self.read_numbers.clear()
        self.sent.clear()
