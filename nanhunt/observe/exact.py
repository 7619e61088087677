"""The exact tracer: every aten operation of a step, forward, backward and optimizer.

NOTE on how a fault is followed.

1. Memory, not Python objects, carries a value: autograd unpacks a saved tensor as a new object, views and in-place
   operations share memory. State is therefore kept per storage, held by a weak reference so that an address is never
   taken for another's.
2. A storage is *tainted* with the indices of the births whose non-finite values it may hold. A read of a tainted
   storage looks at the view that is really read; only then do the births travel on.
3. An operation whose inputs are all untainted needs one look, at its output. A non-finite output is then a birth.
4. Memory from ``empty`` holds anything until it is written, and is not looked at before.
5. A deliberate value (a -inf mask) that an operation turns into NaN is that operation's ingredient: what travels on is
   the operation's own birth.
6. A backward operation belongs to the forward operation whose autograd node runs: the first forward operation
   dispatched after the node was numbered, ``_get_sequence_nr() == node._sequence_nr() + 1``.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanhunt.observe.finite import (
    can_hold_nonfinite,
    first_nonfinite,
    is_finite,
    nonfinite_kinds,
    unreadable_kind,
    value_facts,
)
from nanhunt.observe.memory import NO_BIRTHS, Memory, Storage, covers_storage, storage_key
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.op_info import (
    CANNOT_CREATE,
    UNINITIALISED,
    FocusedOp,
    FocusReached,
    copied,
    copy_of,
    is_deliberate,
    is_log_of_mask,
    is_refusal,
    op_name,
    written,
)
from nanhunt.observe.source import ForwardSite, own_backward_line, user_frame
from nanhunt.records.ops import OpRecord, Phase, Sink, StateSource, Trace

MAX_RECORDS = 20_000
"""Records kept; more are counted. A step that is wholly NaN propagates through every one of its operations."""

_PURGE_EVERY = 4096


@dataclass
class _Call:
    """One operation while it is being judged."""

    index: int
    func: Any
    name: str
    inputs: list[Tensor]
    taint: frozenset[int] = NO_BIRTHS
    saw_nan: bool = False
    saw_inf: bool = False
    written: list[Tensor] = field(default_factory=list)


class ExactTracer(TorchDispatchMode):
    """Records every operation of a step that has to do with non-finite values.

    Use as a context manager around the step. The values and random numbers of the step are the same with and without
    it.

    Args:
        model: Names the modules; None outside modules.
        focus: Indices of operations whose inputs and outputs are kept in ``focused``; after the last of them the step
            is ended with ``FocusReached``.
    """

    def __init__(self, model: nn.Module | None = None, *, focus: Iterable[int] = ()) -> None:
        super().__init__()
        self.focused: dict[int, FocusedOp] = {}
        self._focus = frozenset(focus)
        self._last_focus = max(self._focus, default=-1)
        self._path = ModulePath(model)
        self._phase: Phase = "forward"
        self._num_ops = 0
        self._memory = Memory()
        self._sites: dict[int, ForwardSite] = {}
        self._records: list[OpRecord] = []
        self._num_dropped = 0
        self._sources: list[StateSource] = []
        self._sinks: list[Sink] = []
        self._skipped: Counter[str] = Counter()
        self._problems: list[str] = []
        self._deliberate: set[int] = set()
        self._log_masks: set[int] = set()

    def __enter__(self) -> Self:
        self._path.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._path.__exit__(*exc_info)

    def attach(self, model: nn.Module) -> None:
        """Names the modules of this model, for a tracer made before the model was."""
        self._path.name_modules(model)

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Names the part of the step that runs inside."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def declare(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        """Looks at tensors that exist before the step (batch, parameters, buffers, optimizer state).

        A non-finite one becomes a source, found before any operation.
        """
        with _untraced(), torch.no_grad():
            for name, tensor in named:
                self._declare_one(kind, name, tensor)

    def declare_result(self, name: str, tensor: Tensor, causes: Iterable[Tensor]) -> None:
        """Looks at a tensor that something outside the trace computed from traced tensors.

        If it is non-finite, it holds what was born on the way to its causes; where nothing was, it is a source.
        """
        with _untraced(), torch.no_grad():
            states = [self._memory.find(cause) for cause in causes if not is_finite(cause)]
            births = NO_BIRTHS.union(*(state.births for state in states if state)) - self._deliberate
            if not births:
                self._declare_one("output gradient", name, tensor)
            elif not is_finite(tensor):
                self._memory.add(tensor).births = births

    def reached(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        """Looks at places where a non-finite value does harm, and notes which births arrived there.

        A buffer that still is what it was before the step (a -inf mask, a lowest loss that starts at inf) is no harm.
        """
        with _untraced(), torch.no_grad():
            for name, tensor in named:
                if unreadable_kind(tensor) or is_finite(tensor):
                    continue
                state = self._memory.find(tensor)
                births = state.births if state else NO_BIRTHS
                if kind == "buffer" and state is not None and births:
                    births -= state.own
                    if not births:
                        continue
                self._sinks.append(Sink(kind, name, value_facts(tensor), tuple(sorted(births))))

    @property
    def trace(self) -> Trace:
        """The records so far."""
        return Trace(
            num_ops=self._num_ops,
            ops=tuple(self._records),
            sources=tuple(self._sources),
            sinks=tuple(self._sinks),
            num_dropped=self._num_dropped,
            skipped=tuple(self._skipped.items()),
            problems=tuple(self._problems),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        index = self._num_ops
        self._num_ops += 1
        call = self._guarded(self._before, index, func, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            if call is not None and is_refusal(error):
                self._guarded(self._note_refusal, call)
            raise
        if call is not None:
            self._guarded(self._after, call, args, kwargs, output)
        if index == self._last_focus:
            raise FocusReached
        return output

    def _guarded(self, look: Any, *args: Any) -> Any:
        """Runs a look; its own failure becomes a message and never the user's crash."""
        try:
            return look(*args)
        except Exception as error:  # noqa: BLE001 - the traced program must go on whatever the tracer trips over
            if len(self._problems) < 20:
                self._problems.append(f"{type(error).__name__} while looking at an operation: {error}")
            return None

    def _before(self, index: int, func: Any, args: Any, kwargs: Any) -> _Call:
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = _Call(index, func, name, inputs)
        self._note_site(call)
        if index in self._focus:
            names = tuple(argument.name for argument in func._schema.arguments)
            self.focused[index] = FocusedOp(op_name(func), names, copied(args), copied(kwargs))
        call.written, is_read = written(func, args, kwargs)
        unread = () if is_read else {id(tensor) for tensor in call.written}
        for tensor in inputs:
            state = None if id(tensor) in unread else self._state_of(tensor)
            if state is not None and state.births:
                self._read_tainted(call, tensor, state)
        return call

    def _note_site(self, call: _Call) -> None:
        """Remembers the first operation after each autograd node was numbered (rule 6 of the NOTE)."""
        node = torch._C._current_autograd_node()
        if node is not None and not torch.is_grad_enabled():
            return
        number = torch._C._autograd._get_sequence_nr()
        if number not in self._sites:
            # A backward pass that is itself differentiated belongs to the forward it differentiates.
            known = None if node is None or self._path.in_backward else self._sites.get(node._sequence_nr() + 1)
            self._sites[number] = known or ForwardSite(
                call.index, op_name(call.func), self._path.current, user_frame(), self._phase
            )

    def _note_refusal(self, call: _Call) -> None:
        """An operation that raises over the values it was given is where their births did harm."""
        states = [self._memory.find(tensor) for tensor in call.inputs]
        births = call.taint or NO_BIRTHS.union(*(state.births for state in states if state))
        if births:
            bad = next((tensor for tensor in call.inputs if not is_finite(tensor)), call.inputs[0])
            name = f"refused by {op_name(call.func)}"
            self._sinks.append(Sink("output", name, value_facts(bad), tuple(sorted(births))))

    def _read_tainted(self, call: _Call, tensor: Tensor, state: Storage) -> None:
        """Rule 2: only the view that is really read counts."""
        has_nan, has_inf = (False, False) if unreadable_kind(tensor) else nonfinite_kinds(tensor)
        if has_nan or has_inf:
            call.taint |= state.births
            call.saw_nan |= has_nan
            call.saw_inf |= has_inf

    def _after(self, call: _Call, args: Any, kwargs: Any, output: Any) -> None:
        produced = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if call.index in self._focus:
            self.focused[call.index].outputs = tuple(copy_of(tensor) for tensor in produced)
        overwritten = {id(tensor) for tensor in call.written}
        input_keys = {storage_key(tensor) for tensor in call.inputs}
        shown = {id(tensor) for tensor in produced}
        results = [*produced, *(tensor for tensor in call.written if id(tensor) not in shown)]
        bad: list[Tensor] = []
        for tensor in results:
            is_view = storage_key(tensor) in input_keys and id(tensor) not in overwritten
            if not is_view and self._look_at_result(call, tensor):
                bad.append(tensor)
        if bad:
            self._record_nonfinite(call, args, kwargs, bad)
        elif call.taint and any(storage_key(tensor) not in input_keys for tensor in results):
            self._record(call, "kill", (), deliberate=False)
        if self._num_ops % _PURGE_EVERY == 0:
            self._memory.purge()

    def _look_at_result(self, call: _Call, tensor: Tensor) -> bool:
        """Whether the result is non-finite; keeps the state of its memory."""
        state = self._state_of(tensor, is_result=True)
        if state is None:
            return False
        if call.name in UNINITIALISED:
            state.uninitialised = True
            return False
        if not call.taint and call.name in CANNOT_CREATE and not state.births:
            return False
        if not can_hold_nonfinite(tensor):
            # Read again only where an operation refuses it: the error codes of a decomposition.
            state.births |= call.taint
            return False
        if is_finite(tensor):
            if state.births and covers_storage(tensor):
                state.births = NO_BIRTHS
            return False
        return True

    def _record_nonfinite(self, call: _Call, args: Any, kwargs: Any, bad: Sequence[Tensor]) -> None:
        makes_nan = any(nonfinite_kinds(tensor)[0] for tensor in bad)
        explained = call.saw_nan if makes_nan else (call.saw_nan or call.saw_inf)
        if not explained and not call.taint:
            explained = self._find_unseen_sources(call)
        deliberate = is_deliberate(args, kwargs, makes_nan=makes_nan)
        births = call.taint if explained else self._births_with(call, makes_nan=makes_nan)
        if not explained and deliberate:
            self._deliberate.add(call.index)
        elif not explained and is_log_of_mask(call.name, args):
            self._log_masks.add(call.index)
        for tensor in bad:
            state = self._state_of(tensor, is_result=True)
            if state is not None:
                state.births = births if covers_storage(tensor) else state.births | births
                state.uninitialised = False
        # Counting takes ten times as long as looking, and after a fault nearly every operation propagates.
        facts = () if explained else tuple(value_facts(tensor) for tensor in bad)
        self._record(call, "propagate" if explained else "birth", facts, deliberate=deliberate)

    def _births_with(self, call: _Call, *, makes_nan: bool) -> frozenset[int]:
        """The births that travel on from a birth (rule 5 of the NOTE)."""
        ingredients: set[int] = set()
        if makes_nan:
            ingredients |= self._deliberate
            if "softmax" in call.name or "attention" in call.name:
                ingredients |= self._log_masks
        return (call.taint - ingredients) | {call.index}

    def _find_unseen_sources(self, call: _Call) -> bool:
        """Whether an input holds non-finite values that no recorded operation wrote.

        An operation that overwrites its input has destroyed the evidence, so those inputs are left out.
        """
        overwritten = {storage_key(tensor) for tensor in call.written}
        for tensor in call.inputs:
            key = storage_key(tensor)
            if key in overwritten or unreadable_kind(tensor) or is_finite(tensor):
                continue
            state = self._memory.find(tensor) or self._memory.add(tensor)
            self._add_source("uninitialised memory" if state.uninitialised else "constant", "", tensor, state)
            call.taint |= state.births
        return bool(call.taint)

    def _record(self, call: _Call, kind: Any, facts: tuple[Any, ...], *, deliberate: bool) -> None:
        # What only passes on leaves room for a birth that comes late.
        if len(self._records) >= (MAX_RECORDS if kind == "birth" else MAX_RECORDS // 2):
            self._num_dropped += 1
            return
        site, recomputed, phase = self._where()
        record = OpRecord(
            index=call.index,
            op=op_name(call.func),
            kind=kind,
            phase=phase,
            module=site.module if site else self._path.current,
            source=site.line if site else None,
            forward_index=site.index if site and phase == "backward" else None,
            forward_op=site.op if site and phase == "backward" else None,
            deliberate=deliberate,
            outputs=facts,
            ingredients=tuple(sorted(call.taint)),
            recomputed=recomputed,
            own_backward=own_backward_line(torch._C._current_autograd_node()),
        )
        self._records.append(record)

    def _where(self) -> tuple[ForwardSite | None, bool, Phase]:
        """The site of the running operation, whether it is a recomputation, and its phase."""
        node = torch._C._current_autograd_node()
        recomputed = node is not None and self._path.in_backward
        if node is None or recomputed:
            here = ForwardSite(-1, "", self._path.current, user_frame(), self._phase)
            return here, recomputed, "forward" if recomputed else self._phase
        return self._sites.get(node._sequence_nr() + 1), False, "backward"

    def _declare_one(self, kind: Any, name: str, tensor: Tensor) -> None:
        if unreadable_kind(tensor):
            self._skipped[unreadable_kind(tensor) or ""] += 1
            return
        state = self._memory.find(tensor) or self._memory.add(tensor)
        if not is_finite(tensor):
            self._add_source(kind, name, tensor, state)

    def _add_source(self, kind: Any, name: str, tensor: Tensor, state: Storage) -> None:
        index, facts = -1 - len(self._sources), value_facts(tensor)
        self._sources.append(StateSource(index, kind, name, facts, first_nonfinite(tensor)))
        state.births |= {index}
        state.own |= {index}
        if kind in ("buffer", "constant") and facts.num_neginf == facts.num_nonfinite:
            self._deliberate.add(index)

    def _state_of(self, tensor: Tensor, *, is_result: bool = False) -> Storage | None:
        """What is known of the tensor's memory; memory first seen as an input is looked at now."""
        reason = unreadable_kind(tensor)
        if reason is not None:
            self._skipped[reason] += 1
            return None
        state = self._memory.find(tensor)
        if state is None:
            state = self._memory.add(tensor)
            if not is_result and can_hold_nonfinite(tensor) and not is_finite(tensor):
                self._add_source("constant", "", tensor, state)
        return state


def _untraced() -> Any:
    """Suspends the tracer for its own looks."""
    return torch.utils._python_dispatch._disable_current_modes()
