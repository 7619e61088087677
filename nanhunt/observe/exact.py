"""The exact tracer: every aten operation of a step, forward, backward and optimizer.

While nothing is non-finite, an operation costs one sum over its result, and nothing at all if it can only move or bound
what it is given. The first non-finite result begins the bookkeeping of ``ledger.py``; when the memory that holds it is
gone, it ends. Where an operation stands is ``sites.py``'s affair.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from nanhunt.observe.as_written import AsWritten, is_stance_enough
from nanhunt.observe.call import Call, Origin
from nanhunt.observe.collectives import moves_received
from nanhunt.observe.evidence import evidence_at_birth
from nanhunt.observe.finite import list_is_finite, unreadable_kind
from nanhunt.observe.ledger import Ledger
from nanhunt.observe.modes import untraced
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.op_info import (
    TRAITS,
    FocusedOp,
    FocusReached,
    OpTraits,
    bump_versions,
    copied,
    copy_of,
    is_narrowing,
    is_refusal,
    tensors_in,
    traits_of,
    written,
)
from nanhunt.observe.refusal import refused_matrix
from nanhunt.observe.sites import Sites
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord, Phase, Trace

MAX_EVIDENCE = 64
"""Births whose inputs are described."""

_PURGE_EVERY = 4096

# Types whose sum is finite unless an element is not, or the sum itself is beyond 1e38.
_SUMMED = frozenset((torch.float32, torch.float64, torch.bfloat16))

_sequence_number = torch._C._autograd._get_sequence_nr
_num_function_modes = torch._C._len_torch_function_stack
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_running_node = torch._C._current_autograd_node


class ExactTracer(TorchDispatchMode):
    """Records every operation of a step that has to do with non-finite values.

    Use as a context manager around the step. The values and random numbers of the step are the same with and without
    it.

    Args:
        model: Names the modules; None outside modules.
        focus: Indices of operations whose inputs and outputs are kept in ``focused``; after the last of them the step
            is ended with ``FocusReached``.
        origin: Says what a tensor is that no traced operation wrote.

    Attributes:
        path: Which module is running.
        places: Where operations stand.
        ledger: What is known of the non-finite values.
        evidence: For births, what their inputs held, by index.
        refusal: The last finite matrix that a decomposition refused.
        is_passive: Whether nothing more is looked at.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        focus: Iterable[int] = (),
        origin: Callable[[Tensor], Origin] = lambda tensor: Origin(),
    ) -> None:
        super().__init__()
        self.focused: dict[int, FocusedOp] = {}
        self.path = ModulePath(model)
        self.compiled = AsWritten(ExactTracer.__torch_dispatch__.__code__)
        self.places = Sites(self.path)
        self.ledger = Ledger(self.places, origin)
        self.evidence: dict[int, OffenderEvidence] = {}
        self.refusal: tuple[OpRecord, OffenderEvidence] | None = None
        self.is_passive = False
        self._focus = frozenset(focus)
        self._last_focus = max(self._focus, default=-1)
        self._num_ops = 0
        self._number = -1
        self._problems: list[str] = []

    supports_higher_order_operators = True
    """An operation that takes functions, such as ``flex_attention``, is one operation; else torch would refuse it."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch may compile under the tracer; else it does not even where it cannot do without."""
        return is_stance_enough()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call so that torch.compile does not look into it, which is half of what a call costs;
        # keep_uncompiled does the same once and for all.
        return False

    def __enter__(self) -> Self:
        self.compiled.__enter__()
        self.path.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self.path.__exit__(*exc_info)
        self.compiled.__exit__(*exc_info)

    def attach(self, model: nn.Module) -> None:
        """Names the modules of this model, for a tracer made before the model was."""
        self.path.name_modules(model)

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Names the part of the step that runs inside."""
        before, self.places.phase = self.places.phase, phase
        try:
            yield
        finally:
            self.places.phase = before

    def declare(self, kind: Any, named: Iterable[tuple[str, Tensor]], *, here: bool = False) -> None:
        """Looks at tensors that exist before the step (batch, parameters, buffers, optimizer state).

        A non-finite one becomes a source, found before any operation; with ``here``, at the user's running line.
        """
        place = self.places.here() if here else None
        with untraced(), torch.no_grad():
            for name, tensor in named:
                self.ledger.declare(Origin(kind, name, _owner(kind, name)), tensor, place, self._num_ops - 1)

    def declare_result(self, name: str, tensor: Tensor, causes: Iterable[Tensor]) -> None:
        """Looks at a tensor that something outside the trace computed from traced tensors.

        If it is non-finite, it holds what was born on the way to its causes; where nothing was, it is a source.
        """
        with untraced(), torch.no_grad():
            self.ledger.declare_result(Origin("output gradient", name), tensor, causes)

    def reached(self, kind: Any, named: Iterable[tuple[str, Tensor]]) -> None:
        """Looks at places where a non-finite value does harm, and notes which births arrived there."""
        with untraced(), torch.no_grad():
            for name, tensor in named:
                self.ledger.reached(kind, name, tensor)

    @property
    def trace(self) -> Trace:
        """The records so far."""
        return self.ledger.trace(self._num_ops, self._problems)

    @property
    def is_watchful(self) -> bool:
        """Whether any memory is known to hold a non-finite value."""
        return bool(self.ledger.memory.tainted)

    @property
    def is_suspicious(self) -> bool:
        """Whether any of it is more than a mask."""
        return self.ledger.is_suspicious

    def end_step(self) -> None:
        """Forgets what can no longer do harm."""
        self.guarded(self.ledger.forget_past)
        self.places.number = self._number
        self.places.end_step()
        if len(self.evidence) >= MAX_EVIDENCE // 2:
            kept = {record.index for record in self.ledger.records}
            self.evidence = {index: found for index, found in self.evidence.items() if index in kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:
            if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
                # The subclass takes itself apart; its inner operations come here again.
                return NotImplemented
            if FakeTensor in types:
                # Shapes without values, as distributed tensors are planned with.
                return func(*args, **(kwargs or {}))
        if self.is_passive:
            return func(*args, **kwargs) if kwargs else func(*args)
        index = self._num_ops
        self._num_ops = index + 1
        known = TRAITS.get(id(func))
        traits = known[0] if known is not None else traits_of(func)
        if self._focus or (self.ledger.memory.tainted and self.ledger.memory.is_touched_by(args, kwargs)):
            return self._dispatch_watchfully(index, func, traits, args, kwargs or {})
        if index % _PURGE_EVERY == 0:
            self.ledger.memory.purge()
        number = _sequence_number()
        if number != self._number:
            self._number = number
            try:
                self.places.note(number, index, traits)
            except Exception as error:  # noqa: BLE001 - as in guarded, without the price of a call
                self._note_problem(error)
        try:
            output = func(*args, **kwargs) if kwargs else func(*args)
        except Exception as error:
            if is_refusal(error):
                self.guarded(self._note_refusal, index, traits, args, kwargs or {})
            raise
        if traits.is_collective:
            targets = written(traits, args, kwargs or {})
            self.guarded(self._finish, Call(index, traits, args, kwargs or {}, [], targets), output)
            return output
        if _num_function_modes() or _num_dispatch_modes():
            # Other modes of the user's must not see our looks.
            with untraced():
                if traits.is_foreach and traits.writes:
                    self.guarded(bump_versions, traits, args, kwargs or {})
                self._look_at_once(index, traits, args, kwargs or {}, output)
            return output
        if traits.is_foreach and traits.writes:
            self.guarded(bump_versions, traits, args, kwargs or {})
        if traits.creates and not (traits.shrinks and -1 <= args[1] <= 1):
            # A zero tensor, as autograd makes them, has no memory to read.
            if (
                type(output) is Tensor
                and output.dtype in _SUMMED
                and not traits.writes_beside
                and not output._is_zerotensor()
            ):
                try:
                    total = output.sum().item()
                except Exception:  # noqa: BLE001 - a meta or sparse tensor; the careful look says what it is
                    total = float("nan")
                if total - total == 0.0:
                    return output
            self.guarded(self._look, index, traits, args, kwargs or {}, output)
        elif traits.converts or traits.writes or traits.is_uninitialised or self.ledger.memory.received:
            self.guarded(self._look_if_needed, index, traits, args, kwargs or {}, output)
        return output

    def _look_at_once(self, index: int, traits: OpTraits, args: Any, kwargs: Any, output: Any) -> None:
        """The look without the short way for plain tensors."""
        if traits.creates:
            self.guarded(self._look, index, traits, args, kwargs, output)
        elif traits.converts or traits.writes or traits.is_uninitialised or self.ledger.memory.received:
            self.guarded(self._look_if_needed, index, traits, args, kwargs, output)

    def _look(self, index: int, traits: OpTraits, args: Any, kwargs: Any, output: Any) -> None:
        """The careful look at what is not one plain tensor with a finite sum; nothing was tainted before."""
        results = written(traits, args, kwargs) if traits.writes_beside or traits.writes else []
        results += [tensor for tensor in tensors_in(output) if all(tensor is not known for known in results)]
        if self.places.phase == "optimizer" and traits.name == "_foreach_add_" and not results[-1].dim():
            # The step counters.
            return
        self.ledger.skipped.update(kind for kind in map(unreadable_kind, results) if kind is not None)
        if not list_is_finite(results):
            inputs = tensors_in(*args, *kwargs.values())
            self._finish(Call(index, traits, args, kwargs, inputs, written(traits, args, kwargs)), output)
        elif traits.writes and self.ledger.memory.unwritten:
            for tensor in results:
                self.ledger.memory.note_written(tensor)

    def _look_if_needed(self, index: int, traits: OpTraits, args: Any, kwargs: Any, output: Any) -> None:
        """What cannot create is looked at where it narrows a type, fills memory or moves what a collective brought."""
        memory = self.ledger.memory
        if traits.is_uninitialised:
            for tensor in tensors_in(output):
                memory.note_unwritten(tensor, self.places.site(index, traits))
            return
        filled = False
        if traits.writes and memory.unwritten:
            # Only a copy can bring in what nobody has seen yet.
            filled = any([memory.note_written(t) for t in written(traits, args, kwargs)]) and traits.converts
        is_narrowed = traits.converts and is_narrowing(traits, args, output)
        if filled or is_narrowed or moves_received(memory, traits, args, kwargs, output):
            self._look(index, traits, args, kwargs, output)

    def _dispatch_watchfully(self, index: int, func: Any, traits: OpTraits, args: Any, kwargs: Any) -> Any:
        self.guarded(self.places.note, _sequence_number(), index, traits)
        call = self.guarded(self.ledger.before, index, traits, args, kwargs)
        if index in self._focus:
            self.focused[index] = FocusedOp(traits.full_name, traits.argument_names, copied(args), copied(kwargs))
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            if call is not None and is_refusal(error):
                self.guarded(self._note_refused, call)
            raise
        if traits.is_foreach and traits.writes:
            self.guarded(bump_versions, traits, args, kwargs)
        if index in self._focus:
            self.focused[index].outputs = tuple(copy_of(tensor) for tensor in tensors_in(output))
        if call is not None and (
            traits.creates or traits.converts or traits.writes or call.taint or traits.is_uninitialised
        ):
            self.guarded(self._finish, call, output)
        if self._num_ops % _PURGE_EVERY == 0:
            self.ledger.memory.purge()
        if index == self._last_focus:
            raise FocusReached
        return output

    def _finish(self, call: Call, output: Any) -> None:
        if not self.ledger.after(call, output):
            return
        record = self.ledger.records[-1] if self.ledger.records else None
        if record is None or record.index != call.index or record.kind != "birth" or record.deliberate:
            return
        if len(self.evidence) < MAX_EVIDENCE:
            found = evidence_at_birth(call, output, record, _running_node())
            if found is not None:
                self.evidence[call.index] = found

    def _note_refusal(self, index: int, traits: OpTraits, args: Any, kwargs: Any) -> None:
        self._note_refused(Call(index, traits, args, kwargs, tensors_in(*args, *kwargs.values()), []))

    def _note_refused(self, call: Call) -> None:
        if not self.ledger.refused(call):
            self.refusal = refused_matrix(call, self.places.here(), self.ledger.step, self.ledger.micro_step)

    def guarded(self, look: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a look; its own failure becomes a message and never the user's crash."""
        try:
            if _num_function_modes():
                # A mode of the user's would see every attribute of a tensor that is asked for.
                with torch._C.DisableTorchFunction():
                    return look(*args, **kwargs)
            return look(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the traced program must go on whatever the tracer trips over
            self._note_problem(error)
            return None

    def _note_problem(self, error: Exception) -> None:
        if len(self._problems) < 20:
            self._problems.append(f"{type(error).__name__} while looking at an operation: {error}")


def _owner(kind: Any, name: str) -> str:
    """Dotted path of the module that owns a parameter or buffer of this name."""
    return name.rpartition(".")[0] if kind in ("parameter", "buffer") else ""
