"""Copies of an optimizer and its parameters to step on, and what keeps the originals as they are."""

import contextlib
import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from nanhunt.capture.rng import RawStates
from nanhunt.errors import NanhuntError, first_line
from nanhunt.findings import Skip

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_LONGEST_REASON = 200
_OWN = ("state", "param_groups", "step", "_opt_called")
_MODULE_HOOKS = (
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_pre_hooks",
)


class NoCopy(NanhuntError):
    """Something cannot be copied or stepped; the message says what and why."""


class OtherModel(NanhuntError):
    """A loss uses another model than the one it is given."""


@contextlib.contextmanager
def guarded(what: str, skips: list[Skip]) -> Iterator[None]:
    """A part of the audit; what fails in it becomes a skip, and the other parts go on.

    Raises:
        OtherModel: As it is; what comes of such a loss is not worth a report.
    """
    try:
        yield
    except OtherModel:
        raise
    except NanhuntError as error:
        skips.append(Skip(what, error.message))
    except Exception as error:  # noqa: BLE001 - models, optimizers and schedules are anybody's and fail in any way
        skips.append(Skip(what, f"{type(error).__name__}: {first_line(error)}"[:_LONGEST_REASON]))


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Puts random generators and torch's global optimizer hooks back, and keeps warnings to itself."""
    raw = RawStates.now()
    hooks = {name: getattr(torch_optimizer, name, None) for name in _GLOBAL_HOOKS}
    try:
        for name, value in hooks.items():
            if value is not None:
                setattr(torch_optimizer, name, OrderedDict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in hooks.items():
            if value is not None:
                setattr(torch_optimizer, name, value)
        _put_back(raw)


def _put_back(raw: RawStates) -> None:
    random.setstate(raw.python)
    np.random.set_state(raw.numpy)  # noqa: NPY002 - the global one is meant
    torch.set_rng_state(raw.torch)
    if raw.cuda is not None:
        torch.cuda.set_rng_state_all(raw.cuda)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside what accelerate and others put around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def copy_of(optimizer: Optimizer, replaced: Mapping[int, Tensor], *, with_state: bool) -> Optimizer:
    """An optimizer with the same settings, without hooks, over other tensors.

    Args:
        optimizer: The original.
        replaced: The tensor to take the place of each of its parameters, by ``id``; others are left out.
        with_state: Whether to copy the state of those parameters.

    Raises:
        NoCopy: If it holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(replaced)
    try:
        clone: Any = object.__new__(type(optimizer))
        rest = {key: value for key, value in vars(optimizer).items() if key not in (*_OWN, *_HOOKS)}
        clone.__dict__.update(copy.deepcopy(rest, memo))
        for name in _HOOKS:
            clone.__dict__[name] = OrderedDict()
        clone.param_groups = [
            {key: copy.deepcopy(value, memo) for key, value in group.items() if key != "params"}
            | {"params": [replaced[id(one)] for one in group["params"] if id(one) in replaced]}
            for group in optimizer.param_groups
        ]
        clone.state = defaultdict(dict)
        if with_state:
            for parameter, state in optimizer.state.items():
                if id(parameter) in replaced:
                    clone.state[replaced[id(parameter)]] = copy.deepcopy(state, memo)
    # Another package's optimizer may hold anything.
    except Exception as error:
        raise NoCopy(
            f"{type(optimizer).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}"
        ) from error
    return clone


def step(optimizer: Optimizer, rates: list[float] | None = None) -> None:
    """One step of a copy, with these rates of its groups.

    Raises:
        NoCopy: If it raises.
    """
    for group, rate in zip(optimizer.param_groups, rates or (), strict=rates is not None):
        if group.get("lr") is not None:
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    # Some optimizers look into the first tensor of each group.
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    try:
        with unnoticed():
            optimizer.step()
    except Exception as error:
        name = type(optimizer).__name__
        raise NoCopy(f"a step of {name} on copies failed: {type(error).__name__}: {first_line(error)}") from error


def batch_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]
) -> tuple[float, dict[int, Tensor | None]]:
    """The loss of a batch, and the gradient it gives to each parameter, by ``id``, run on a copy of the model.

    Raises:
        NoCopy: If the model cannot be copied or the step fails.
        OtherModel: If the loss is that of another model than the one it is given.
    """
    try:
        with unnoticed(), untouched(model) as touched:
            clone, batch = copy.deepcopy(model, _without_hooks(model)), _detached(batch)
            clone.zero_grad(set_to_none=True)
            with torch.enable_grad():
                value = loss(clone, batch)
                value.backward()
            if touched():
                raise OtherModel(
                    "the loss does not use the model it is given, but the original",
                    help="write it as lambda model, batch: ..., of that model only",
                )
    except OtherModel:
        raise
    except Exception as error:
        raise NoCopy(
            f"a step with the batch on a copy of the model failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    pairs = zip(model.parameters(), clone.parameters(), strict=True)
    return float(value.detach()), {id(own): other.grad for own, other in pairs}


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Puts gradients, buffers and modes of a model back; gives whether something has left gradients in it."""
    gradients = [(one, one.grad) for one in model.parameters()]
    buffers = [(one, one.detach().clone()) for one in model.buffers() if not (one.is_meta or is_lazy(one))]
    modes = [(one, one.training) for one in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield lambda: any(parameter.grad is not None for parameter, _ in gradients)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, kept in buffers:
            if not torch.equal(buffer, kept):
                buffer.detach().copy_(kept)
        for module, mode in modes:
            module.training = mode


def _without_hooks(model: nn.Module) -> dict[int, Any]:
    """What to copy in place of a user's hooks; those that torch computes weights with, as in ``weight_norm``, stay."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _MODULE_HOOKS:
            hooks = getattr(module, name, None)
            if hooks is not None:
                kept = [(key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.")]
                memo[id(hooks)] = OrderedDict(kept)
    return memo


def _detached(value: Any) -> Any:
    """A copy of a batch; tensors that belong to a graph cannot be copied as they are."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
