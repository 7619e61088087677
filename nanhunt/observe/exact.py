"""The exact tracer: every aten operation of a step, forward, backward and optimizer.

NOTE on how a fault is followed.

1. Memory, not Python objects, carries a value: autograd unpacks a saved tensor as a new object, views and in-place
   operations share memory. State is therefore kept per storage, held by a weak reference so that an address is never
   taken for another's.
2. A storage is *tainted* with the indices of the births whose non-finite values it may hold. A read of a tainted
   storage looks at the view that is really read; only then do the births travel on.
3. An operation whose inputs are all untainted needs one look, at its output. A non-finite output is then a birth.
4. Memory from ``empty`` holds anything until it is written, and is not looked at before.
5. A backward operation belongs to the forward operation whose autograd node runs: the first forward operation
   dispatched after the node was numbered, ``_get_sequence_nr() == node._sequence_nr() + 1``.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanhunt.observe.finite import (
    can_hold_nonfinite,
    first_nonfinite,
    is_finite,
    unreadable_kind,
    value_facts,
)
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.op_info import (
    CANNOT_CREATE,
    UNINITIALISED,
    FocusedOp,
    copied,
    has_nonfinite_constant,
    op_name,
    written,
)
from nanhunt.observe.source import source_line, user_frame
from nanhunt.records.ops import OpRecord, Phase, Sink, SourceLine, StateSource, Trace

MAX_RECORDS = 20_000
"""Records kept; more are counted. A step that is wholly NaN propagates through every one of its operations."""

_PURGE_EVERY = 4096
_NO_BIRTHS: frozenset[int] = frozenset()


@dataclass
class _ForwardSite:
    """Where a forward operation ran; what its backward operations are attributed to."""

    index: int
    op: str
    module: str
    frame: tuple[str, int, str] | None
    phase: Phase


@dataclass
class _Storage:
    """What is known of one piece of memory."""

    ref: StorageWeakRef
    births: frozenset[int] = _NO_BIRTHS
    uninitialised: bool = False


@dataclass
class _Call:
    """One operation while it is being judged."""

    index: int
    func: Any
    name: str
    inputs: list[Tensor]
    taint: frozenset[int] = _NO_BIRTHS
    saw_nan: bool = False
    saw_inf: bool = False
    written: list[Tensor] = field(default_factory=list)


class ExactTracer(TorchDispatchMode):
    """Records every operation of a step that has to do with non-finite values.

    Use as a context manager around the step. The values and random numbers of the step are the same with and without
    it.

    Args:
        model: Names the modules; None outside modules.
        focus: Indices of operations whose inputs and outputs are kept in ``focused``.
    """

    def __init__(self, model: nn.Module | None = None, *, focus: Iterable[int] = ()) -> None:
        super().__init__()
        self.focused: dict[int, FocusedOp] = {}
        self._focus = frozenset(focus)
        self._path = ModulePath(model)
        self._phase: Phase = "forward"
        self._num_ops = 0
        self._storages: dict[int, _Storage] = {}
        self._sites: dict[int, _ForwardSite] = {}
        self._records: list[OpRecord] = []
        self._num_dropped = 0
        self._sources: list[StateSource] = []
        self._sinks: list[Sink] = []
        self._skipped: Counter[str] = Counter()
        self._problems: list[str] = []

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
        with torch.no_grad():
            for name, tensor in named:
                self._declare_one(kind, name, tensor)

    def reached(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        """Looks at places where a non-finite value does harm, and notes which births arrived there."""
        with _untraced(), torch.no_grad():
            for name, tensor in named:
                if unreadable_kind(tensor) or is_finite(tensor):
                    continue
                state = self._storages.get(_storage_key(tensor))
                births = tuple(sorted(state.births)) if state else ()
                self._sinks.append(Sink(kind, name, value_facts(tensor), births))

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
        output = func(*args, **kwargs)
        if call is not None:
            self._guarded(self._after, call, args, kwargs, output)
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
        for tensor in inputs:
            state = self._state_of(tensor)
            if state is not None and state.births:
                self._read_tainted(call, tensor, state)
        call.written = written(func, args, kwargs)
        return call

    def _note_site(self, call: _Call) -> None:
        """Remembers the first operation after each autograd node was numbered (rule 5 of the NOTE)."""
        if torch._C._current_autograd_node() is None:
            number = torch._C._autograd._get_sequence_nr()
            if number not in self._sites:
                self._sites[number] = _ForwardSite(
                    call.index, op_name(call.func), self._path.current, user_frame(), self._phase
                )

    def _read_tainted(self, call: _Call, tensor: Tensor, state: _Storage) -> None:
        """Rule 2: only the view that is really read counts."""
        if unreadable_kind(tensor) is None and not is_finite(tensor):
            facts = value_facts(tensor)
            call.taint |= state.births
            call.saw_nan |= facts.num_nan > 0
            call.saw_inf |= facts.num_posinf + facts.num_neginf > 0

    def _after(self, call: _Call, args: Any, kwargs: Any, output: Any) -> None:
        produced = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if call.index in self._focus:
            self.focused[call.index].outputs = tuple(tensor.detach().clone() for tensor in produced)
        overwritten = {id(tensor) for tensor in call.written}
        input_keys = {_storage_key(tensor) for tensor in call.inputs}
        results = [*call.written, *(tensor for tensor in produced if id(tensor) not in overwritten)]
        bad: list[Tensor] = []
        for tensor in results:
            is_view = _storage_key(tensor) in input_keys and id(tensor) not in overwritten
            if not is_view and self._look_at_result(call, tensor):
                bad.append(tensor)
        if bad:
            self._record_nonfinite(call, args, kwargs, bad)
        elif call.taint and any(_storage_key(tensor) not in input_keys for tensor in results):
            self._record(call, "kill", (), deliberate=False)
        if self._num_ops % _PURGE_EVERY == 0:
            self._purge()

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
            return False
        if is_finite(tensor):
            if state.births and _covers_storage(tensor):
                state.births = _NO_BIRTHS
            return False
        return True

    def _record_nonfinite(self, call: _Call, args: Any, kwargs: Any, bad: Sequence[Tensor]) -> None:
        facts = [value_facts(tensor) for tensor in bad]
        makes_nan = any(item.num_nan for item in facts)
        explained = call.saw_nan if makes_nan else (call.saw_nan or call.saw_inf)
        if not explained and not call.taint:
            explained = self._find_unseen_sources(call)
        births = call.taint if explained else call.taint | {call.index}
        deliberate = has_nonfinite_constant(args, kwargs)
        for tensor in bad:
            state = self._state_of(tensor, is_result=True)
            if state is not None:
                state.births = births if _covers_storage(tensor) else state.births | births
                state.uninitialised = False
        self._record(call, "propagate" if explained else "birth", tuple(facts), deliberate=deliberate)

    def _find_unseen_sources(self, call: _Call) -> bool:
        """Whether an input holds non-finite values that no recorded operation wrote.

        An operation that overwrites its input has destroyed the evidence, so those inputs are left out.
        """
        overwritten = {_storage_key(tensor) for tensor in call.written}
        for tensor in call.inputs:
            key = _storage_key(tensor)
            if key in overwritten or unreadable_kind(tensor) or is_finite(tensor):
                continue
            state = self._storages[key]
            self._add_source("uninitialised memory" if state.uninitialised else "constant", "", tensor, state)
            call.taint |= state.births
        return bool(call.taint)

    def _record(self, call: _Call, kind: Any, facts: tuple[Any, ...], *, deliberate: bool) -> None:
        if len(self._records) >= MAX_RECORDS:
            self._num_dropped += 1
            return
        site, recomputed, phase = self._where()
        record = OpRecord(
            index=call.index,
            op=op_name(call.func),
            kind=kind,
            phase=phase,
            module=site.module if site else self._path.current,
            source=_line_of(site),
            forward_index=site.index if site and phase == "backward" else None,
            forward_op=site.op if site and phase == "backward" else None,
            deliberate=deliberate,
            outputs=facts,
            ingredients=tuple(sorted(call.taint)),
            recomputed=recomputed,
        )
        self._records.append(record)

    def _where(self) -> tuple[_ForwardSite | None, bool, Phase]:
        """The site of the running operation, whether it is a recomputation, and its phase."""
        node = torch._C._current_autograd_node()
        recomputed = node is not None and self._path.depth > 0
        if node is None or recomputed:
            here = _ForwardSite(-1, "", self._path.current, user_frame(), self._phase)
            return here, recomputed, "forward" if recomputed else self._phase
        return self._sites.get(node._sequence_nr() + 1), False, "backward"

    def _declare_one(self, kind: Any, name: str, tensor: Tensor) -> None:
        if unreadable_kind(tensor):
            self._skipped[unreadable_kind(tensor) or ""] += 1
            return
        state = self._new_state(tensor)
        if not is_finite(tensor):
            self._add_source(kind, name, tensor, state)

    def _add_source(self, kind: Any, name: str, tensor: Tensor, state: _Storage) -> None:
        index = -1 - len(self._sources)
        self._sources.append(StateSource(index, kind, name, value_facts(tensor), first_nonfinite(tensor)))
        state.births |= {index}

    def _state_of(self, tensor: Tensor, *, is_result: bool = False) -> _Storage | None:
        """What is known of the tensor's memory; memory first seen as an input is looked at now."""
        reason = unreadable_kind(tensor)
        if reason is not None:
            self._skipped[reason] += 1
            return None
        state = self._storages.get(_storage_key(tensor))
        if state is None:
            state = self._new_state(tensor)
            if not is_result and can_hold_nonfinite(tensor) and not is_finite(tensor):
                self._add_source("constant", "", tensor, state)
        return state

    def _new_state(self, tensor: Tensor) -> _Storage:
        state = _Storage(StorageWeakRef(tensor.untyped_storage()))
        self._storages[state.ref.cdata] = state
        return state

    def _purge(self) -> None:
        """Forgets memory that is gone, so that a long trace stays small."""
        self._storages = {key: state for key, state in self._storages.items() if not state.ref.expired()}


def _storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's memory; 0 for tensors without any."""
    return tensor.untyped_storage()._cdata if unreadable_kind(tensor) is None else 0


def _covers_storage(tensor: Tensor) -> bool:
    """Whether the tensor is the whole of its memory."""
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def _line_of(site: _ForwardSite | None) -> SourceLine | None:
    return source_line(site.frame) if site else None


def _untraced() -> Any:
    """Suspends the tracer for its own looks."""
    return torch.utils._python_dispatch._disable_current_modes()
