"""What an optimizer does to the weights: how large they become, and what it had for the first element it spoilt.

A step keeps two small tensors of norms; nothing is read back from an accelerator before somebody asks.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.observe.finite import first_nonfinite, is_finite, unreadable_kind, value_facts
from nanhunt.observe.health_step import unseen
from nanhunt.observe.values import state_tensors
from nanhunt.records.ops import Sink
from nanhunt.records.updates import OptimizerFacts, SpoiltElement, WeightHistory, WeightSample

KEPT_STEPS = 32
"""Steps of which the size of the weights is remembered."""

MAX_SPOILT = 64
"""Spoilt tensors described."""


class _Step(NamedTuple):
    """One step, the sizes still as tensors; learning rate and weight decay by group."""

    number: int
    rates: tuple[tuple[float, float], ...]
    weights: Tensor
    gradients: Tensor | None
    with_gradient: tuple[int, ...]


class _Followed:
    """One optimizer: its parameters, the group of each, and its last steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.num_members = optimizer, _num_members(optimizer)
        members = [
            (parameter, number)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if _is_plain(parameter)
        ]
        self.parameters = [parameter for parameter, _ in members]
        self.groups = [number for _, number in members]
        self.names: Mapping[int, str] = {}
        self.steps: deque[_Step] = deque(maxlen=KEPT_STEPS)
        self.gradients: Tensor | None = None
        self.with_gradient: tuple[int, ...] = ()


class UpdateProbe:
    """Follows what optimizers do; changes nothing."""

    def __init__(self) -> None:
        self._followed: dict[int, _Followed] = {}
        self._spoilt: list[SpoiltElement] = []

    def before_step(self, optimizer: Optimizer, step: int) -> None:
        """Looks at how large the gradients are, and at what the weights are before the first step."""
        followed = self._followed.get(id(optimizer))
        if followed is None or followed.num_members != _num_members(optimizer):
            followed = self._followed[id(optimizer)] = _Followed(optimizer)
        if not followed.parameters:
            return
        with unseen():
            if not followed.steps:
                followed.steps.append(_Step(step - 1, (), _magnitudes(followed.parameters), None, ()))
            gradients = [parameter.grad for parameter in followed.parameters]
            usable = {
                n: gradient for n, gradient in enumerate(gradients) if gradient is not None and _is_plain(gradient)
            }
            followed.gradients = _magnitudes(list(usable.values())) if usable else None
            followed.with_gradient = tuple(usable)

    def after_step(self, optimizer: Optimizer, names: Mapping[int, str], step: int) -> None:
        """Looks at how large the weights have become."""
        followed = self._followed.get(id(optimizer))
        if followed is None or not followed.parameters:
            return
        followed.names = names
        with unseen():
            weights = _magnitudes(followed.parameters)
        rates = tuple(map(_rates, optimizer.param_groups))
        followed.steps.append(_Step(step, rates, weights, followed.gradients, followed.with_gradient))

    def note_spoilt(self, optimizer: Optimizer, names: Mapping[int, str], sinks: Sequence[Sink], step: int) -> None:
        """Describes what the step that has just ended made non-finite.

        Args:
            optimizer: Has stepped.
            names: Parameter names by ``id``.
            sinks: What was found of it.
            step: Its number.
        """
        births = {sink.name: sink.births for sink in sinks}
        tensors: list[tuple[Tensor, str, Tensor]] = [
            *((parameter, "", parameter) for parameter, _ in _members(optimizer)),
            *state_tensors(optimizer),
        ]
        with unseen():
            for parameter, key, value in tensors:
                name = names.get(id(parameter), "a parameter")
                found = births.get(f"{key} of {name}" if key else name)
                if found and len(self._spoilt) < MAX_SPOILT and _is_plain(value) and not is_finite(value):
                    self._spoilt.append(_described(optimizer, parameter, key, value, name, found, step))

    def records(self) -> OptimizerFacts:
        """Everything kept so far."""
        with unseen():
            histories = [_history(followed) for followed in self._followed.values() if len(followed.steps) > 1]
        return OptimizerFacts(tuple(histories), tuple(self._spoilt))


def _described(
    optimizer: Optimizer, parameter: Tensor, key: str, value: Tensor, name: str, births: tuple[int, ...], step: int
) -> SpoiltElement:
    index = first_nonfinite(value)
    facts = value_facts(value)
    number, group = next(
        (number, group)
        for number, group in enumerate(optimizer.param_groups)
        if any(member is parameter for member in group["params"])
    )
    return SpoiltElement(
        births=births,
        optimizer=type(optimizer).__name__,
        parameter=name,
        key=key,
        dtype=facts.dtype,
        index=index,
        value=_at(value, index, value.shape),
        num_nonfinite=facts.num_nonfinite,
        num_elements=facts.num_elements,
        gradient=_at(parameter.grad, index, value.shape) if _is_plain(parameter.grad) else None,
        state=dict(_numbers_at(optimizer.state.get(parameter, {}), index, value.shape)),
        settings=dict(_settings(group)),
        group=number,
        step=step,
    )


def _at(tensor: Tensor | None, index: tuple[int, ...], shape: torch.Size) -> Any:
    """The value at a position, where the tensor has the shape to which it belongs; None where it has another."""
    if tensor is None or tensor.shape != shape:
        return None
    found = tensor.detach()[index]
    return float(found.abs() if found.is_complex() else found)


def _numbers_at(state: Mapping[str, Any], index: tuple[int, ...], shape: torch.Size) -> Iterator[tuple[str, float]]:
    for key, value in state.items():
        if isinstance(value, Tensor) and _is_plain(value):
            found = _at(value, () if value.dim() == 0 else index, torch.Size() if value.dim() == 0 else shape)
            if found is not None:
                yield key, found
        elif isinstance(value, int | float):
            yield key, float(value)


def _settings(group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a parameter group; of a pair such as ``betas``, each."""
    for key, value in group.items():
        values = [(key, value)] if not isinstance(value, tuple) else [(f"{key}[{n}]", v) for n, v in enumerate(value)]
        for name, single in values:
            if key != "params" and (isinstance(single, int | float) or _is_number(single)):
                yield name, float(single)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and unreadable_kind(value) is None and value.dim() == 0


def _rates(group: Mapping[str, Any]) -> tuple[float, float]:
    """Learning rate and weight decay; NaN where a group has none, or one that would have to be read back."""
    rates = [group.get(key) for key in ("lr", "weight_decay")]
    lr, decay = (float(rate) if isinstance(rate, int | float) else math.nan for rate in rates)
    return lr, decay


def _members(optimizer: Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def _num_members(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and unreadable_kind(tensor) is None
        and tensor.element_size() > 1
        and bool(tensor.numel())
    )


def _magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, in float64; NaN where it holds one."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        # A norm of a list takes six times as long there as a pass over each, and reading a number back costs nothing.
        bounds = [torch.aminmax(tensor.detach()) for tensor in tensors]
        return torch.tensor([max(-low.item(), high.item()) for low, high in bounds], dtype=torch.float64)
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors], math.inf)
    first = norms[0].device
    return torch.stack([norm.to(device=first, dtype=torch.float64) for norm in norms])


def _history(followed: _Followed) -> WeightHistory:
    """That of the parameter which is largest after the last step in which all weights are finite."""
    weights = torch.stack([step.weights for step in followed.steps]).cpu()
    finite = torch.isfinite(weights).all(dim=1).nonzero().flatten()
    place = int(weights[int(finite[-1]) if len(finite) else 0].argmax())
    parameter, number_of_group = followed.parameters[place], followed.groups[place]
    samples = []
    for number, step in enumerate(followed.steps):
        lr, decay = step.rates[number_of_group] if step.rates else (math.nan, math.nan)
        gradient = None
        if step.gradients is not None and place in step.with_gradient:
            gradient = float(step.gradients[step.with_gradient.index(place)])
        samples.append(WeightSample(step.number, float(weights[number, place]), gradient, _known(lr), _known(decay)))
    return WeightHistory(
        type(followed.optimizer).__name__,
        followed.names.get(id(parameter), "a parameter"),
        str(parameter.dtype).removeprefix("torch."),
        tuple(samples),
        bool(followed.optimizer.param_groups[number_of_group].get("maximize")),
    )


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number
