"""A model with fresh weights run forward and backward, and what was seen of its layers and parameters."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nanhunt.audit.init_looks import Looks
from nanhunt.audit.init_weights import weight_of
from nanhunt.audit.init_zeros import blocked_by_zeros
from nanhunt.capture.rng import rng_state, set_rng_state
from nanhunt.errors import NanhuntError, first_line
from nanhunt.observe.values import tensors_of
from nanhunt.records.init_audit import ActivationPass, LayerPass

Loss = Callable[[nn.Module, Any], Any]


@dataclass
class Pass:
    """One initialisation.

    Attributes:
        layers: By name, in the order in which they ran first.
        activations: By module, function and the layer before.
        output: Of the model itself.
        input_varies: Whether the samples differ.
        stds: Standard deviation of each parameter.
        gradient_norms: Of the parameters; None where the backward pass did not come to one.
        zero: Parameters of two axes or more that are 0 throughout.
        blocked: Those of them that hold each other at 0: no gradient, at first and after a few steps.
        equal: Weights whose units are all the same, and are given the same gradient.
        has_backward: Whether the loss depends on the parameters.
    """

    layers: dict[str, LayerPass] = field(default_factory=dict)
    activations: dict[tuple[str, str, str], ActivationPass] = field(default_factory=dict)
    output: LayerPass | None = None
    input_varies: bool = False
    stds: dict[str, float] = field(default_factory=dict)
    num_nonfinite: dict[str, int] = field(default_factory=dict)
    gradient_norms: dict[str, float | None] = field(default_factory=dict)
    zero: set[str] = field(default_factory=set)
    blocked: set[str] = field(default_factory=set)
    equal: set[str] = field(default_factory=set)
    has_backward: bool = False


def run_pass(model: nn.Module, batch: Any, loss: Loss, seed: int) -> Pass:
    """Runs a model of our own, which is changed by it.

    Raises:
        NanhuntError: If the model or the loss fails.
    """
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    seen = Pass(stds=_stds(model), num_nonfinite=_num_nonfinite(model), zero=_zero(model))
    looks = Looks(model)
    with torch.enable_grad(), looks.watching():
        value = _value(model, copied(batch), loss)
    if value.requires_grad:
        seen.has_backward = True
        _backward(value)
    if not looks.has_run and all(own.grad is None for own in model.parameters()):
        raise NanhuntError(
            "the loss does not use the model that it is given", help="write loss(model, batch), and call that model"
        )
    seen.layers, seen.activations = looks.result(), looks.activations
    seen.output, seen.input_varies = looks.output, looks.input_varies
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    seen.gradient_norms = {name: _gradient_norm(own) for name, own in trained.items()}
    if seen.has_backward:
        units = _unit_weights(model)
        seen.equal = {name for name, own in trained.items() if name in units and _has_equal_units(own)}
        zero = {name: own for name, own in trained.items() if name in seen.zero}
        seen.blocked = blocked_by_zeros(model, zero, lambda: _backward(_value(model, copied(batch), loss)))
    return seen


def in_float64(seen: Pass, build: Callable[[int], nn.Module], batch: Any, loss: Loss, seed: int) -> Pass:
    """The same pass with what differs between samples as it is in float64, where the model runs in it."""
    try:
        model = build(seed).double()
        torch.manual_seed(seed)
        looks = Looks(model)
        with torch.no_grad(), looks.watching():
            loss(model, tree_map(_doubled, copied(batch)))
    except Exception:  # noqa: BLE001 - a model may do in float32 alone; then the fall is told as far as that shows it
        return seen
    wide = looks.result()
    layers = {
        name: replace(one, variation=wide[name].variation, rounding=wide[name].rounding) if name in wide else one
        for name, one in seen.layers.items()
    }
    return replace(seen, layers=layers)


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@contextmanager
def kept_rng() -> Iterator[None]:
    """Puts every random generator back."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def projected(model: nn.Module, batch: Any) -> Any:
    """What stands in for a loss: the model's own where it gives one, else a random projection of its outputs.

    Every element of the output is weighted by a random sign, so that no cancellation is built in.
    """
    output = call(model, batch)
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    parts = [part for part in tensors_of(output) if part.is_floating_point() and part.requires_grad and part.numel()]
    if not parts:
        return torch.zeros(())
    return sum(((part * (torch.rand_like(part) - 0.5).sign()).mean() for part in parts), torch.zeros(()))


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: by keyword for a mapping, by place for a tuple, as ``forward`` takes it."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if isinstance(batch, Mapping):
        takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        names = {one.name for one in parameters}
        taken = {key: value for key, value in batch.items() if takes_all or key in names}
        return model(**taken) if taken else model(batch)
    if isinstance(batch, tuple | list):
        takes_all = any(one.kind is one.VAR_POSITIONAL for one in parameters)
        needed = sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
        return model(*batch[: len(batch) if takes_all else max(needed, 1)])
    return model(batch)


def _value(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    try:
        value = loss(model, batch)
    # The user's model and loss may fail in any way.
    except Exception as error:
        raise NanhuntError(f"the model fails on the batch: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(value, Mapping):
        value = sum(value.values(), torch.zeros(()))
    if not isinstance(value, Tensor):
        raise NanhuntError(f"the loss is a {type(value).__name__}, not a tensor")
    return value if value.dim() == 0 else value.mean()


def _backward(value: Tensor) -> None:
    try:
        value.backward()
    except Exception as error:
        raise NanhuntError(f"the backward pass fails: {type(error).__name__}: {first_line(error)}") from error


def copied(batch: Any) -> Any:
    """A copy that a model may change.

    Raises:
        NanhuntError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(batch)
    # Data of others may refuse in any way.
    except Exception as error:
        raise NanhuntError(
            f"the batch, a {type(batch).__name__}, cannot be copied: {first_line(error)}",
            help="give one batch, not what makes batches",
        ) from error


def _zero(model: nn.Module) -> set[str]:
    return {
        name
        for name, own in model.named_parameters()
        if own.dim() >= 2 and own.numel() > 1 and not own.is_meta and not own.any()
    }


def _stds(model: nn.Module) -> dict[str, float]:
    return {
        name: float(own.detach().double().std(correction=0))
        for name, own in model.named_parameters()
        if own.is_floating_point() and own.numel()
    }


def _num_nonfinite(model: nn.Module) -> dict[str, int]:
    return {name: own.numel() - int(torch.isfinite(own).sum()) for name, own in model.named_parameters()}


def _gradient_norm(parameter: Tensor) -> float | None:
    if parameter.grad is None:
        return None
    gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _unit_weights(model: nn.Module) -> set[str]:
    """Weights whose first axis is units that see the same inputs; the filters of a grouped convolution do not."""
    names = set()
    for name, module in model.named_modules():
        is_dense = isinstance(module, nn.Linear) or (
            isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1 and not module.transposed
        )
        weight = weight_of(module) if is_dense else None
        if weight is not None and weight.shape[0] > 1:
            names |= {
                f"{name}.{key}".strip(".") for key, own in module.named_parameters(recurse=False) if own is weight
            }
    return names


def _has_equal_units(weight: Tensor) -> bool:
    gradient = weight.grad
    if gradient is None or not weight.any() or not bool((weight == weight[:1]).all()):
        return False
    largest = gradient.abs().amax()
    # Equal units are summed in different orders by the matrix library.
    return bool(largest > 0) and bool((gradient - gradient[:1]).abs().amax() <= 1e-4 * largest)


def names_of(passes: Sequence[Pass]) -> list[str]:
    """Layers that every pass saw, in the order of the first."""
    return [name for name in passes[0].layers if all(name in one.layers for one in passes)]
