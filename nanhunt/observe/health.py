"""The health probe: how large values and gradients are at sampled steps, before anything is non-finite.

On sampled steps every tensor that enters or leaves a followed module is looked at, each distinct tensor once, and its
gradient through a tensor hook. The extremes stay on their device and are read together when the step is over. Modules
are heard through a ``ModulePath``; one of the probe's own is in place on sampled steps only.
"""

import math
import statistics
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.health_step import Names, SampledStep, unseen
from nanhunt.observe.module_path import ModulePath
from nanhunt.observe.readings import Readings
from nanhunt.records.health import (
    Health,
    InfiniteMoment,
    ModuleHealth,
    ModuleSample,
    ParameterHealth,
    ParameterSample,
    ScaleSample,
)

MAX_MODULES = 2000
MAX_PROBLEMS = 20

KEPT_FIRST = 8
"""Samples at the beginning of a run that are never thinned out: what later ones are compared with."""
KEPT, KEPT_SCALES = 32, 256
ODD_STEPS = 4
"""Steps sampled after one that looked odd."""

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
# The norm of a float32 gradient below 1e-23 is 0, for its squares are.
_NEARLY_NOTHING = 1e-20
# Up to here the square of a gradient, times 1 - beta2, stays finite in float32 for any beta2.
_SQUARE_MAY_OVERFLOW = 1e18
_RISE = 10.0
# Their outputs are their inputs, moved or left out.
_UNINTERESTING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)

Item = TypeVar("Item")


class HealthProbe:
    """Follows magnitudes through a run. Changes nothing, and its own failures only become ``problems``.

    Args:
        path: Tells of the modules that are called; None for one of its own.
    """

    def __init__(self, path: ModulePath | None = None) -> None:
        self._path = path if path is not None else ModulePath(None)
        self._has_own_path = path is None
        self._modules: list[nn.Module] = []
        self._kinds: dict[str, str] = {}
        self._names: dict[int, str] = {}
        self._history: list[SampledStep] = []
        self._scales: list[ScaleSample] = []
        self._moments: dict[tuple[str, str], InfiniteMoment] = {}
        self._optimizers: dict[int, tuple[weakref.ref[Optimizer], Names]] = {}
        self._last_finite: int | None = None
        self._problems: list[str] = []
        self._step = self._num_steps = self._num_sampled = 0
        self._odd_left = self._num_odd = 0
        self._peaks: list[tuple[float, float]] = []
        self._sampled: SampledStep | None = None

    def attach(self, named_modules: Mapping[str, nn.Module]) -> Self:
        """Follows these: leaves, owners of parameters, elements of numbered containers, and the model itself."""
        for name, module in named_modules.items():
            is_leaf = next(module.children(), None) is None
            is_owner = next(module.parameters(recurse=False), None) is not None
            is_followed = is_owner or not name or name.rpartition(".")[2].isdigit() or is_leaf
            if is_followed and not isinstance(module, _UNINTERESTING) and len(self._modules) < MAX_MODULES:
                # Held, so that no other object can come by its id.
                self._modules.append(module)
                self._names.setdefault(id(module), name)
                self._kinds.setdefault(name, type(module).__name__)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finish_step()
        self._modules, self._names = [], {}

    def begin_step(self, step: int) -> None:
        """Ends the step before, and decides whether this one is looked at."""
        self._finish_step()
        self._step = step
        number, self._num_steps = self._num_steps, self._num_steps + 1
        is_odd = self._odd_left > 0 and self._num_odd < max(32, number // 8)
        if is_odd:
            self._odd_left -= 1
        if not (is_odd or _is_due(number)):
            return
        self._num_odd += is_odd and not _is_due(number)
        is_deep = is_odd or self._num_sampled % 4 == 0
        counts_zeros = is_odd or self._num_sampled == 0
        self._num_sampled += 1
        self._sampled = SampledStep(
            *(self._names, step, self._note_problem), is_deep=is_deep, counts_zeros=counts_zeros, is_thorough=is_odd
        )
        if self._has_own_path:
            self._path.__enter__()
        self._path.on_output = self._sampled.look_at

    def before_optimizer_step(self, optimizer: Optimizer, names: Names) -> None:
        """Looks at the gradients, and keeps some weights to compare.

        Args:
            optimizer: About to step.
            names: Parameter names by ``id``.
        """
        with self._guarded():
            known = self._optimizers.get(id(optimizer))
            if known is None or known[0]() is not optimizer:
                self._optimizers[id(optimizer)] = (weakref.ref(optimizer), names)
            if self._sampled is not None:
                self._sampled.see_gradients(optimizer, names)

    def after_optimizer_step(self, optimizer: Optimizer, names: Names) -> None:
        """Looks at what the step changed."""
        with self._guarded():
            if self._sampled is not None:
                self._sampled.see_updates()

    def note_scale(self, scale: float, skipped: bool) -> None:
        """Keeps the loss scale after a step, and whether the scaler left that step out."""
        if not self._scales or self._scales[-1].scale != scale:
            _keep(self._scales, ScaleSample(self._step, scale, skipped), KEPT_SCALES)

    @property
    def problems(self) -> tuple[str, ...]:
        """What of its looks failed, one line each."""
        return tuple(self._problems)

    def records(self) -> Health:
        """Everything kept so far; ends the current step."""
        self._finish_step()
        with self._guarded():
            self._look_at_moments()
        modules: dict[str, list[ModuleSample]] = {}
        parameters: dict[str, list[ParameterSample]] = {}
        facts: dict[str, tuple[str, int]] = {}
        for step in self._history:
            for name, sample in step.modules():
                modules.setdefault(name, []).append(sample)
            for name, dtype, num_elements, gradient in step.parameters():
                facts[name] = (dtype, num_elements)
                parameters.setdefault(name, []).append(gradient)
        kinds = self._kinds
        return Health(
            modules=tuple(ModuleHealth(name, kinds[name], tuple(found)) for name, found in modules.items()),
            parameters=tuple(ParameterHealth(name, *facts[name], tuple(found)) for name, found in parameters.items()),
            steps=tuple(step.health for step in self._history),
            moments=tuple(self._moments.values()),
            scales=tuple(self._scales),
            num_steps=self._num_steps,
            problems=tuple(self._problems),
        )

    def _finish_step(self) -> None:
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            return
        self._path.on_output = None
        if self._has_own_path:
            self._path.__exit__()
        sampled.stop()
        with self._guarded(), unseen():
            sampled.read()
            _keep(self._history, sampled)
            norms = sampled.gradient_norms
            if self._num_sampled % 8 == 0 or any(norm > _SQUARE_MAY_OVERFLOW for norm in norms):
                self._look_at_moments()
            if self._is_odd(sampled, norms):
                self._odd_left = ODD_STEPS

    def _is_odd(self, sampled: SampledStep, norms: list[float]) -> bool:
        """Whether the following steps are worth a look as well."""
        peaks = (max(norms, default=0.0), sampled.largest_value)
        before = [statistics.median(values) for values in zip(*self._peaks, strict=True)]
        risen = any(now > _RISE * then > 0 for now, then in zip(peaks, before, strict=False))
        self._peaks = [*self._peaks[-15:], peaks] if all(map(math.isfinite, peaks)) else self._peaks
        tiny = sum(norm < _NEARLY_NOTHING for norm in norms) > len(norms) / 4
        updates = sampled.health.updates
        stuck = updates is not None and updates.num_changed < updates.num_watched / 2
        return risen or tiny or stuck

    def _look_at_moments(self) -> None:
        """Reads the second moments of all optimizers, and notes those at infinity whose weights are finite."""
        found = False
        for reference, names in self._optimizers.values():
            optimizer = reference()
            if optimizer is not None:
                found |= self._look_at_state(optimizer, names)
        if not found:
            self._last_finite = self._step

    def _look_at_state(self, optimizer: Optimizer, names: Names) -> bool:
        moments = [
            (names.get(id(parameter), "parameter"), key, parameter, state[key])
            for parameter, state in optimizer.state.items()
            for key in _SECOND_MOMENTS
            if isinstance(state.get(key), Tensor) and _is_dense(state[key])
        ]
        with unseen():
            readings = Readings()
            for _, _, _, moment in moments:
                readings.add(moment.detach().amax())
            infinite = [moment for moment, top in zip(moments, readings.read(), strict=True) if top == math.inf]
            for name, key, parameter, moment in infinite:
                if (name, key) not in self._moments and bool(torch.isfinite(parameter.detach()).all()):
                    places = torch.isinf(moment).nonzero()
                    index = tuple(int(place) for place in places[0])
                    self._moments[name, key] = InfiniteMoment(
                        name, key, self._step, self._last_finite, len(places), moment.numel(), index
                    )
        return bool(infinite)

    def _note_problem(self, problem: Exception) -> None:
        first_line = str(problem).partition("\n")[0]
        self._note(f"step {self._step}: {type(problem).__name__}: {first_line}")

    def _note(self, text: str) -> None:
        if len(self._problems) < MAX_PROBLEMS and text not in self._problems:
            self._problems.append(text)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with torch._C.DisableTorchFunction():
                yield
        except Exception as problem:  # noqa: BLE001 - whatever goes wrong here is ours and must not end the training
            self._note_problem(problem)


def _is_due(number: int) -> bool:
    """Whether the step with this number is looked at in any case: the first ones, then ever fewer."""
    return number < KEPT_FIRST or number % (8 if number < 128 else 32) == 0


def _keep(items: list[Item], item: Item, kept: int = KEPT) -> None:
    """Appends; where that makes too many, drops every other of those between the first and the last few."""
    items.append(item)
    if len(items) > kept:
        items[KEPT_FIRST : -KEPT_FIRST // 2] = items[KEPT_FIRST : -KEPT_FIRST // 2 : 2]


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and bool(tensor.numel())
    )
