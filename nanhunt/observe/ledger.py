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

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nanhunt.observe.call import Call, Here, Origin, Places
from nanhunt.observe.collectives import ends_collective, note_received, sent
from nanhunt.observe.finite import can_hold_nonfinite, is_finite, nonfinite_kinds, unreadable_kind, value_facts
from nanhunt.observe.memory import NO_BIRTHS, storage_key
from nanhunt.observe.op_info import OpTraits, has_nonfinite_number, is_deliberate, is_log_of_mask, tensors_in, written
from nanhunt.observe.sources import STATE, Sources
from nanhunt.records.ops import OpRecord, Sink, ValueFacts

# What takes -inf for the logarithm of 0, and what makes one number of many, so that -inf is not that any more.
_IN_LOG_SPACE = ("softmax", "attention", "logsumexp", "logaddexp", "logcumsumexp")
_CONTRACTIONS = ("mm", "mv", "dot", "linear", "conv", "addr", "cdist")


class Ledger(Sources):
    """Follows non-finite values through the operations it is shown.

    Args:
        places: Says where the running operation stands; asked only when something is written down.
        origin: Says what a tensor is that no traced operation wrote.

    Attributes:
        read_numbers: The non-finite loss that was last read as a number; who reads it may end the step over it.
        held: Sinks that count only if a ``GradScaler`` does not get over them.
        is_scaling: Whether the loss is just being multiplied by its scale.
        is_scaled: Whether it was, in this step.
        scaling: Births of that multiplication.
        fed: Births that a model was given as its input.
        sent: What collectives were given to carry to other processes since somebody looked.
    """

    def __init__(self, places: Places, origin: Callable[[Tensor], Origin]) -> None:
        super().__init__(places, origin)
        self.read_numbers: dict[str, Sink] = {}
        self.held: list[Sink] = []
        self.is_scaling = self.is_scaled = False
        self.scaling: set[int] = set()
        self.fed: set[int] = set()
        self.sent: list[Sink] = []
        self._numbers = self._with_nan = NO_BIRTHS

    # Before and after an operation.

    def before(self, index: int, traits: OpTraits, args: Any, kwargs: Any) -> Call:
        """Looks at those inputs whose memory is tainted."""
        inputs = tensors_in(*args, *kwargs.values())
        call = Call(index, traits, args, kwargs, inputs, written(traits, args, kwargs))
        unread = {id(tensor) for tensor in call.written} if traits.overwrites else set()
        tainted = self.memory.tainted
        self._with_nan = NO_BIRTHS
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
        self._with_nan |= births if has_nan else NO_BIRTHS
        if call.traits.name == "_local_scalar_dense":
            self._numbers = births - self._deliberate
        if tensor.requires_grad and tensor.numel() == 1 and not births <= self._deliberate:
            # Perhaps the loss; who reads it as a number may end the step over it.
            self.read_numbers["loss"] = Sink("loss", "loss", value_facts(tensor), tuple(sorted(births)))

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
        is_read_first = call.written and not call.traits.overwrites
        if call.written and self.memory.unwritten and not (is_read_first and can_hold_nonfinite(tensor)):
            self.memory.note_written(tensor)
        if not can_hold_nonfinite(tensor):
            if call.taint and "linalg" in call.traits.name:
                # The error codes of a decomposition: read again only where an operation refuses it.
                self.memory.taint(tensor, call.taint)
            return False
        if is_finite(tensor):
            self.memory.clean(tensor)
            self.memory.note_written(tensor)
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
        if any(part in call.traits.name for part in _CONTRACTIONS):
            self._log_masks -= {birth for birth in call.taint if birth < 0}
        births = self._births_with(call, here, makes_nan=makes_nan, explained=explained)
        if not explained and deliberate:
            self._deliberate.add(call.index)
        elif not explained and is_log_of_mask(call.traits.name, call.args):
            self._log_masks.add(call.index)
        for tensor in bad:
            self.memory.taint(tensor, births)
        # Counting takes ten times as long as looking, and after a fault nearly every operation propagates.
        facts = () if explained or deliberate else tuple(value_facts(tensor) for tensor in bad)
        self._record(call, "propagate" if explained else "birth", facts, here, deliberate=deliberate)

    def _births_with(self, call: Call, here: Here, *, makes_nan: bool, explained: bool) -> frozenset[int]:
        """The births that travel on, from a birth by rule 5 of the NOTE."""
        if explained:
            # What holds nothing but -inf has no part in the NaN of another input.
            return call.taint - (self._log_masks - self._with_nan) if makes_nan and self._with_nan else call.taint
        ingredients: set[int] = set()
        if makes_nan:
            ingredients |= self._deliberate
            names = f"{call.traits.name} {here.forward_op or ''}"
            if any(part in names for part in _IN_LOG_SPACE):
                ingredients |= self._log_masks
        return (call.taint - ingredients) | {call.index}

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
            births -= state.own if state is not None and kind in STATE else NO_BIRTHS
            if not births:
                return False
        if kind in STATE or kind == "output":
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
