"""``nanhunt.compare_compiled``: one step as it is written, compiled, and in float64.

NOTE on what is the same in the three runs, and what is not.

1. Every run begins with the same parameters, buffers, batch and random generators, and all of them are put back
   afterwards, gradients included. What a model keeps in other attributes is not.
2. The eager run is traced, which changes no value. The compiled run is not: a dispatch mode would make torch run it as
   written. Of it only outputs, loss and gradients are seen.
3. float64 is the referee of precision, not of meaning: a logarithm of zero is infinite there as well.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nanhunt.capture.put_back import put_back
from nanhunt.capture.rng import rng_state
from nanhunt.findings import Finding
from nanhunt.hunt import trace
from nanhunt.records.comparison import Difference, StepRun
from nanhunt.reports.comparison import render

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One step run as written, compiled, and in float64; ``print`` shows it.

    Attributes:
        eager: The code as it is written.
        compiled: The same, compiled.
        float64: The same as written, in float64.
        apart: How far eager and compiled code lie apart; None where there is nothing to compare.
        first: The first offender of the eager run, with its place; None if it found nothing.
        notes: What to bear in mind.
        backend: What compiled it.
        seconds: Wall time of it all.
    """

    eager: StepRun
    compiled: StepRun
    float64: StepRun
    apart: Difference | None
    first: Finding | None
    notes: tuple[str, ...]
    backend: str
    seconds: float

    @property
    def verdict(self) -> str:
        """Where the fault exists, in one sentence."""
        is_error = not (self.eager.harmed or self.compiled.harmed) and (self.eager.error or self.compiled.error)
        what = "the error" if is_error else "the fault"
        in_eager, in_compiled = self.eager.has_fault, self.compiled.has_fault
        if self.compiled.skipped:
            exists = "exists" if in_eager else "does not exist"
            return f"{what} {exists} in eager code; compiled code did not run"
        if in_eager and in_compiled:
            return f"{what} exists in both"
        if not in_eager and not in_compiled:
            return f"{what} exists in neither"
        return f"{what} exists in {'eager' if in_eager else 'compiled'} code only"

    def __str__(self) -> str:
        runs = (self.eager, self.compiled, self.float64)
        return render(runs, self.apart, self.first, self.verdict, self.notes, self.backend, self.seconds)


@dataclass(frozen=True)
class _Outcome:
    """The values of one run by name; gradients as ``gradient of head.weight``."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""
    skipped: str = ""

    @property
    def nonfinite(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if not tensor.isfinite().all()]

    @property
    def harmed(self) -> list[str]:
        """Outputs do harm themselves where no loss is made of them."""
        return [name for name in self.nonfinite if self.loss is None or name not in self.outputs]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.outputs, **({} if self.loss is None else {"loss": self.loss}), **self.gradients}


def compare_compiled(
    model: Callable[..., Any],
    batch: Any,
    loss: Loss | None = None,
    *,
    backend: str | Callable[..., Any] = "inductor",
    **compile_options: Any,
) -> Comparison:
    """Runs one step, forward and backward, as written and compiled: a fault may exist in one of them only.

    Model, batch and random generators are as before when it returns.

    Args:
        model: A module or function. What is compiled already runs as it was compiled.
        batch: What it is called with: one tensor, a tuple of arguments or a dictionary of keyword arguments. Where
            ``loss`` is given, anything that it can take apart.
        loss: Computes the loss from the model and the batch, as ``loss(model, batch)``; None to go backward from the
            sum of the model's outputs, which then have to be finite themselves.
        backend: What to compile with.
        compile_options: Passed on to ``torch.compile``, such as ``dynamic=True``.

    Returns:
        What each run gave, where the eager one first went wrong, and in which of them the fault exists.
    """
    started = time.perf_counter()
    step = _Step(model, batch, loss)
    eager, first = step.run_eager()
    compiled = step.run_compiled(backend, compile_options)
    referee = step.run_float64()
    as_written, as_compiled = _summary("eager code", eager, referee), _summary("compiled code", compiled, referee)
    in_float64 = _summary("float64", referee, _Outcome())
    return Comparison(
        as_written,
        as_compiled,
        in_float64,
        apart=_difference(eager, compiled),
        first=first,
        notes=(*_on_precision(as_written, in_float64), *step.notes),
        backend=backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__),
        seconds=time.perf_counter() - started,
    )


class _Step:
    """The step, and the state that every run of it begins with."""

    def __init__(self, model: Callable[..., Any], batch: Any, loss: Loss | None) -> None:
        self.notes: list[str] = []
        self._model = model
        self._eager: Any = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", model)
        self._batch, self._loss = batch, loss
        owner = self._eager if isinstance(self._eager, nn.Module) else getattr(self._eager, "__self__", None)
        self._module = owner if isinstance(owner, nn.Module) else None
        self._is_compiled = self._eager is not model or _has_compiled_parts(self._module)

    def run_eager(self) -> tuple[_Outcome, Finding | None]:
        """The code as written, under the exact tracer."""
        with put_back(self._module):
            before = rng_state()
            with trace(self._module, outputs="auto" if self._loss is not None else "always", finite=False) as hunt:
                outcome = self._run(self._eager, self._batch, self._module)
                harmed = outcome.harmed
                # The trace knows the parameters of a module, and nothing of a function.
                for kind, named in (("output", outcome.outputs), ("gradient", outcome.gradients)):
                    hunt.reached(kind, ((name, tensor) for name, tensor in named.items() if name in harmed))
            if not _are_equal(before, rng_state()):
                others = "float64 and compiled code" if self._is_compiled else "float64"
                self.notes.append(f"the step draws random numbers; those of {others} may be others")
        return outcome, hunt.report().first

    def run_compiled(self, backend: Any, options: dict[str, Any]) -> _Outcome:
        """Compiled, with no mode on."""
        with put_back(self._module):
            if self._is_compiled:
                return self._run(self._model, self._batch, self._module)
            with _random_numbers_as_written(backend):
                function = torch.compile(self._eager, backend=backend, **options)
                return self._run(function, self._batch, self._module)

    def run_float64(self) -> _Outcome:
        """The code as written, with parameters, buffers, batch and new constants in float64."""
        default = torch.get_default_dtype()
        with put_back(self._module), torch.compiler.set_stance("force_eager"):
            try:
                module = copy.deepcopy(self._module).double() if self._module is not None else None
                function: Any = self._eager if module is None else module
                if module is not None and self._eager is not self._module:
                    function = getattr(module, self._eager.__name__)
                torch.set_default_dtype(torch.float64)
                outcome = self._run(function, tree_map(_doubled, self._batch), module)
            except Exception as error:  # noqa: BLE001 - a model may refuse to be copied in ways of its own
                return _Outcome(skipped=_in_one_line(error))
            finally:
                torch.set_default_dtype(default)
        return _Outcome(skipped=outcome.error) if outcome.error else outcome

    def _run(self, function: Any, batch: Any, module: nn.Module | None) -> _Outcome:
        batch = tree_map(_copied, batch)
        called = _Called(function)
        root: Any = None
        loss: Any = None
        error = ""
        try:
            if self._loss is not None:
                terms = self._loss(called, batch)
                root = loss = sum(terms.values()) if isinstance(terms, dict) else terms
            else:
                root = _sum_of(_applied(called, batch))
            if isinstance(root, Tensor) and root.requires_grad:
                root.sum().backward()
        except Exception as raised:  # noqa: BLE001 - what a step raises is a result of it
            if type(raised).__module__.startswith(("torch._dynamo", "torch._inductor")):
                return _Outcome(skipped=_in_one_line(raised))
            error = _in_one_line(raised)
        outputs = {f"output {number}": tensor for number, tensor in enumerate(called.outputs)}
        return _Outcome(
            outputs={name: _plain(tensor) for name, tensor in outputs.items()},
            loss=_plain(loss) if isinstance(loss, Tensor) else None,
            gradients={f"gradient of {name}": _plain(tensor) for name, tensor in _gradients(module, batch)},
            error=error,
        )


class _Called:
    """The model to whoever calls it; its outputs are kept."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.outputs: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._function(*args, **kwargs)
        # A copy, for what follows may write to it.
        self.outputs += [leaf.detach().clone() for leaf in tree_leaves(result) if _is_number(leaf)]
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _applied(function: Any, batch: Any) -> Any:
    if isinstance(batch, dict):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple | list) else function(batch)


def _sum_of(outputs: Any) -> Tensor | None:
    """In float64, so that adding up overflows nothing."""
    parts = [leaf.abs() if leaf.is_complex() else leaf for leaf in tree_leaves(outputs) if _is_number(leaf)]
    return torch.stack([part.double().sum() for part in parts]).sum() if parts else None


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _doubled(leaf: Any) -> Any:
    if not _is_number(leaf):
        return leaf
    wide = torch.complex128 if leaf.is_complex() else torch.float64
    return leaf.detach().to(wide).requires_grad_(leaf.requires_grad)


def _plain(tensor: Tensor) -> Tensor:
    """The values, in a type that any other can be compared in."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _gradients(module: nn.Module | None, batch: Any) -> Iterator[tuple[str, Tensor]]:
    named = list(module.named_parameters()) if module is not None else []
    inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    named += [(f"input {number}", leaf) for number, leaf in enumerate(inputs) if leaf.is_leaf]  # type: ignore[misc]
    return ((name, tensor.grad) for name, tensor in named if tensor.grad is not None)


def _has_compiled_parts(module: nn.Module | None) -> bool:
    parts = list(module.modules()) if module is not None else []
    return any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts)


def _random_numbers_as_written(backend: Any) -> contextlib.AbstractContextManager[Any]:
    """Inductor draws its random numbers its own way, unless it is told to draw them as eager code does."""
    if backend != "inductor":
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(fallback_random=True)


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _in_one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _summary(name: str, outcome: _Outcome, referee: _Outcome) -> StepRun:
    return StepRun(
        name=name,
        loss=outcome.loss.sum().item() if outcome.loss is not None else None,
        num_outputs=len(outcome.outputs),
        num_gradients=len(outcome.gradients),
        nonfinite=tuple(outcome.nonfinite),
        harmed=tuple(outcome.harmed),
        difference=_difference(outcome, referee),
        error=outcome.error,
        skipped=outcome.skipped,
    )


def _on_precision(eager: StepRun, float64: StepRun) -> Iterator[str]:
    if eager.harmed and not float64.skipped:
        yield (
            "float64 is not finite either" if float64.harmed else "float64 is finite: more precision removes the fault"
        )


def _difference(one: _Outcome, other: _Outcome) -> Difference | None:
    """The tensor that lies farthest apart; rounding in a gradient that ought to be zero is small beside the others."""
    kinds = [(one.outputs, other.outputs), (one.gradients, other.gradients)]
    if one.loss is not None and other.loss is not None:
        kinds.append(({"loss": one.loss}, {"loss": other.loss}))
    return max((d for pair in kinds for d in _differences(*pair)), key=lambda d: d.relative, default=None)


def _differences(ones: dict[str, Tensor], others: dict[str, Tensor]) -> list[Difference]:
    found: list[tuple[str, float]] = []
    largest = 0.0
    for name, one in ones.items():
        other = others.get(name)
        if other is None or other.shape != one.shape:
            continue
        both = one.isfinite() & other.isfinite()
        a, b = one[both], other[both]
        if a.numel():
            found.append((name, (a - b).abs().max().item()))
            largest = max(largest, a.abs().max().item(), b.abs().max().item())
    return [Difference(name, distance, distance / largest if largest else 0.0) for name, distance in found]
