"""The probe of the dtype audit: every operation of a step, its types, and the same in float64."""

import sys
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from nanhunt.audit.dtype_call import Call, is_worth_it, num_terms, weight
from nanhunt.audit.dtype_looks import (
    batch_tensor,
    floating,
    is_narrower,
    narrowing,
    vanished,
    watches_constants,
    zero_dim,
)
from nanhunt.audit.dtype_memory import MemoryNotes
from nanhunt.audit.dtype_regions import AutocastRegions
from nanhunt.audit.dtype_sums import Totals
from nanhunt.audit.shadow import (
    MAX_ELEMENTS,
    SUMS,
    can_run_again,
    compared,
    first_number,
    is_half,
    is_number,
    magnitudes,
    name_of,
    wide,
    widened,
)
from nanhunt.errors import first_line
from nanhunt.findings import Skip
from nanhunt.numerics import count
from nanhunt.observe.as_written import AsWritten, is_stance_enough
from nanhunt.observe.modes import untraced
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.op_info import OpTraits, tensors_in, traits_of
from nanhunt.observe.sites import Sites
from nanhunt.observe.source import user_place
from nanhunt.records.dtype_audit import (
    BatchTensor,
    DtypeAudit,
    LinalgInput,
    Narrowing,
    OpPlace,
    OpUse,
    Root,
    ShadowError,
    VanishedConstant,
)

MAX_RUNS = 2
"""How often an operation of one kind and place runs again in float64."""

_CONVERSIONS = {"_to_copy", "copy_"}
_LINALG = ("linalg_", "_linalg_", "cholesky", "triangular_solve", "ormqr", "geqrf", "lstsq", "_lu_", "lu_")
_NO_DECOMPOSITION = ("linalg_vector_norm", "linalg_cross", "linalg_vecdot", "linalg_matrix_exp")

_sequence_number = torch._C._autograd._get_sequence_nr


@dataclass(frozen=True)
class _Rounded:
    """What is known of memory whose values went through half."""

    dtype: str
    change: float | None


class DtypeProbe(TorchDispatchMode):
    """Records the types of a step's operations; use as a context manager around the step.

    The values and random numbers of the step are the same with and without it.

    Args:
        model: Names the modules.

    Attributes:
        num_ops: Operations seen.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.num_ops = 0
        self._path = ModulePath(model)
        self._places = Sites(self._path)
        self._path.on_enter = self._note_call
        self._regions = AutocastRegions()
        self._compiled = AsWritten(DtypeProbe.__torch_dispatch__.__code__)
        halves = {name_of(parameter.dtype) for parameter in model.parameters() if is_half(parameter.dtype)}
        self._half_parameters = tuple(sorted(halves))
        self._number = -1
        self._uses: dict[Any, OpUse] = {}
        self._runs: dict[Any, int] = {}
        self._narrowings: dict[Any, Narrowing] = {}
        self._constants: dict[Any, VanishedConstant] = {}
        self._linalg: dict[Any, LinalgInput] = {}
        self._batch: list[BatchTensor] = []
        self._names: MemoryNotes[str] = MemoryNotes()
        self._inherited: MemoryNotes[bool] = MemoryNotes()
        self._rounded: MemoryNotes[_Rounded] = MemoryNotes()
        self._makers: MemoryNotes[OpPlace] = MemoryNotes()
        self._totals = Totals()
        self._not_run: dict[str, int] = {}
        self._problems: dict[str, None] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch may compile under the probe; else it does not even where it cannot do without."""
        return is_stance_enough()

    def __enter__(self) -> Self:
        self._compiled.__enter__()
        self._path.__enter__()
        self._regions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._regions.__exit__(*exc_info)
        self._path.__exit__(*exc_info)
        self._compiled.__exit__(*exc_info)

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The line that calls the model says nothing of what runs in a package's model: that package's line does."""
        place = user_place(sys._getframe(1))
        if place.code is not None and place.users is None:
            self._places.drivers |= {(place.code, place.position)}

    def declare(self, name: str, tensor: Tensor) -> None:
        """Names a tensor of the batch."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return
        with untraced(), torch.no_grad():
            self._names.put(tensor, name)
            if is_half(tensor.dtype) and tensor.numel():
                self._batch.append(batch_tensor(name, tensor))

    def maker_of(self, tensor: Tensor) -> OpPlace | None:
        """The operation that made it."""
        return self._makers.get(tensor)

    def records(self, root: Root | None) -> DtypeAudit:
        """What was seen."""
        return DtypeAudit(
            uses=tuple(self._uses.values()),
            narrowings=tuple(self._narrowings.values()),
            constants=tuple(self._constants.values()),
            accumulations=self._totals.records(),
            linalg=tuple(self._linalg.values()),
            batch=tuple(self._batch),
            root=root,
            half_parameters=self._half_parameters,
            num_ops=self.num_ops,
        )

    def skips(self) -> list[Skip]:
        """What could not be compared."""
        found = [
            Skip(f"comparing {count(number, 'operation')} with float64", why) for why, number in self._not_run.items()
        ]
        return [*found, *(Skip("looking at an operation", problem) for problem in self._problems)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            # The subclass takes itself apart; its inner operations come here again.
            return NotImplemented
        if FakeTensor in types or not hasattr(func, "_schema"):
            return func(*args, **kwargs)
        self.num_ops += 1
        traits = traits_of(func)
        number = _sequence_number()
        if number != self._number:
            self._number = number
            self._guarded(self._places.note, number, self.num_ops, traits)
        before = self._guarded(self._before, func, traits, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            self._guarded(self._note_refusal, traits, args, kwargs, error)
            raise
        if before is not None:
            self._guarded(self._look, before, output)
        return output

    def _guarded(self, function: Any, *args: Any) -> Any:
        """A failure of ours is noted and never reaches the step."""
        try:
            with untraced(), torch.no_grad():
                return function(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step goes on and the report says so
            self._problems[f"{type(error).__name__}: {first_line(error)}"] = None
            return None

    def _before(self, func: Any, traits: OpTraits, args: Any, kwargs: Any) -> Call | None:
        """What the operation is about to change is copied; None for what has nothing to do with such numbers."""
        inputs = tensors_in(*args, *kwargs.values())
        if any(tensor.layout is not torch.strided or tensor.is_meta for tensor in inputs):
            return None
        call = Call(func, traits, args, kwargs, floating([*args, *kwargs.values()]))
        if not traits.writes:
            return call
        call.shadowed = self._shadow_arguments(call, None)
        is_watched = call.shadowed is not None or watches_constants(traits.name)
        if is_watched and call.floats and call.floats[0].numel() <= MAX_ELEMENTS:
            call.first = call.floats[0].detach().clone()
        return call

    def _place(self, traits: OpTraits) -> OpPlace:
        here = self._places.here()
        return OpPlace(traits.full_name, here.phase, here.module, here.source, here.forward_op or "")

    def _look(self, call: Call, output: Any) -> None:
        result = first_number(output)
        if result is None or result.layout is not torch.strided or result.is_meta:
            return
        place = self._place(call.traits)
        types = tuple(f"{name_of(x.dtype)}{'' if x.dim() else ' ()'}" for x in call.floats)
        # Of many alike, as for a list that is joined, one says it.
        key = place, tuple(dict.fromkeys(types)), name_of(result.dtype)
        use = self._uses.get(key)
        use = OpUse(place, key[1], key[2]) if use is None else replace(use, count=use.count + 1)
        name = call.traits.name
        if call.first is None and call.floats:
            call.first = call.floats[0]
        if name in _CONVERSIONS:
            error = self._convert(call, key, result)
            if error is not None:
                use = replace(use, error=error if use.error is None else use.error.joined(error))
        else:
            use = self._compare(call, use, result)
            self._note_constants(call, place, result)
        self._uses[key] = use
        if place.phase == "forward":
            self._note_memory(call, place, result)

    def _compare(self, call: Call, use: OpUse, result: Tensor) -> OpUse:
        arguments = call.shadowed if call.traits.writes else self._shadow_arguments(call, result)
        if arguments is None:
            return use
        try:
            # First, for the operation may write to its arguments.
            scale = _sum_of_magnitudes(call, arguments)
            shadow = first_number(call.func(*arguments[0], **arguments[1]))
        except Exception as refused:  # noqa: BLE001 - an operation may not exist in float64; that is counted
            self._not_done(f"{call.traits.full_name} does not run in float64: {first_line(refused)}")
            return use
        error = compared(result, shadow, scale) if shadow is not None else None
        if error is None:
            return use
        if is_half(result.dtype):
            self._rounded.put(result, _Rounded(name_of(result.dtype), error.norm_relative))
        found = zero_dim(call.floats, result)
        inherited = self._is_inherited(call, error)
        return replace(
            use,
            error=error if use.error is None else use.error.joined(error),
            num_terms=num_terms(call, result),
            zero_dim=found or use.zero_dim,
            num_inherited=use.num_inherited + inherited,
        )

    def _shadow_arguments(self, call: Call, result: Tensor | None) -> tuple[Any, Any] | None:
        """The arguments in float64, if it is worth it; what is written to has to be copied before it is."""
        if call.traits.name in _CONVERSIONS or not can_run_again(call.func, call.traits):
            return None
        # Before an operation ran, only its inputs are known; it writes to one of them, so the types are as well.
        known = [*call.floats, *([] if result is None else [result])]
        if not is_worth_it(call, known):
            return None
        key = self._place(call.traits), tuple(tensor.dtype for tensor in call.floats)
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] > MAX_RUNS:
            return None
        if sum(tensor.numel() for tensor in known) > MAX_ELEMENTS:
            self._not_done(f"more than {MAX_ELEMENTS:,} elements each")
            return None
        return widened(call.args), widened(call.kwargs)

    def _not_done(self, reason: str) -> None:
        self._not_run[reason] = self._not_run.get(reason, 0) + 1

    def _is_inherited(self, call: Call, error: ShadowError) -> bool:
        """Whether half values made under autocast are computed with, and rounded, where autocast is switched off."""
        if not self._regions.is_switched_off or self._half_parameters or not error.norm_relative:
            return False
        return any(is_half(tensor.dtype) and self._inherited.get(tensor) for tensor in call.floats)

    def _convert(self, call: Call, key: Any, result: Tensor) -> ShadowError | None:
        """What a conversion loses, if anything."""
        source = call.args[1] if call.traits.name == "copy_" else call.args[0]
        if not isinstance(source, Tensor) or source.dtype == result.dtype or not source.numel():
            return None
        name = self._names.get(source) or ""
        if name:
            self._names.put(result, name)
        if is_half(source.dtype) and not is_half(result.dtype):
            self._rounded.put(result, self._rounded.get(source) or _Rounded(name_of(source.dtype), None))
        if not is_narrower(result.dtype, source.dtype) or source.numel() > MAX_ELEMENTS:
            return None
        before = source.expand(result.shape)
        error = compared(result, wide(before)) if is_number(source) else None
        if is_half(result.dtype) and error is not None:
            self._rounded.put(result, _Rounded(name_of(result.dtype), error.norm_relative))
        # What is already infinite is no overflow of this conversion.
        found = narrowing(key[0], before, result, name)
        known = self._narrowings.get((key, name))
        self._narrowings[key, name] = found if known is None or weight(found) > weight(known) else known
        return error

    def _note_constants(self, call: Call, place: OpPlace, result: Tensor) -> None:
        if not watches_constants(call.traits.name):
            return
        for found in vanished(call.traits.name, place, call.args, call.kwargs, call.first, result):
            self._constants.setdefault((found.place, found.kind, found.value, found.dtype), found)

    def _note_memory(self, call: Call, place: OpPlace, result: Tensor) -> None:
        """What later operations of the forward pass have to know of this one's result, and what it tells of its own."""
        name = call.traits.name
        self._makers.put(result, place)
        if is_half(result.dtype) and self._regions.is_on:
            self._inherited.put(result, True)
        elif is_half(result.dtype) and not any(self._inherited.get(tensor) for tensor in call.floats):
            self._inherited.drop(result)
        if name.startswith(_LINALG) and not name.startswith(_NO_DECOMPOSITION):
            for rounded in filter(None, map(self._rounded.get, call.floats)):
                self._linalg.setdefault(place, LinalgInput(place, rounded.dtype, rounded.change))
        if name in ("clone", "contiguous") and call.floats and (known := self._rounded.get(call.floats[0])):
            self._rounded.put(result, known)
        term = call.args[1] if name in ("add", "add_") and len(call.args) > 1 else None
        if isinstance(term, Tensor) and term.dim() <= result.dim() and call.first is not None:
            self._totals.added(place, call.first, term, result, float(call.kwargs.get("alpha", 1)))

    def _note_refusal(self, traits: OpTraits, args: Any, kwargs: Any, error: Exception) -> None:
        halves = [tensor for tensor in floating([*args, *kwargs.values()]) if is_half(tensor.dtype)]
        if halves and traits.name.startswith(_LINALG):
            place = self._place(traits)
            self._linalg[place] = LinalgInput(place, name_of(halves[0].dtype), None, first_line(error))


def _sum_of_magnitudes(call: Call, arguments: tuple[Any, Any]) -> Tensor | None:
    """Of a sum; None for other operations."""
    if call.traits.name not in SUMS:
        return None
    args, kwargs = magnitudes(arguments)
    return first_number(call.func(*args, **kwargs))
