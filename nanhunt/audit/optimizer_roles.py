"""What each parameter of a model does, told by the type of its module and, where that is foreign, by its behaviour."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from nanhunt.records.optimizer_audit import ParameterFacts, Role

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_MAPS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


class Told(NamedTuple):
    """A role, and what it was told from where that is not the module's type."""

    role: Role
    inferred: str = ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what DistributedDataParallel, DataParallel and torch.compile put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its name without what wrappers add."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in unwrapped(model).named_parameters()}


def dtype_name(tensor: Tensor) -> str:
    """``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def parameter_facts(
    model: nn.Module,
    optimizer: Optimizer,
    with_gradient: Mapping[int, bool],
    others: Sequence[Optimizer] = (),
) -> tuple[tuple[ParameterFacts, ...], tuple[ParameterFacts, ...]]:
    """The parameters of the model, and the tensors that only the optimizer holds.

    Args:
        model: The model.
        optimizer: The optimizer.
        with_gradient: Whether a step gives a parameter a gradient, by ``id``; empty where none was run.
        others: Optimizers that hold other parameters of the model.
    """
    places: dict[int, list[int]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            places.setdefault(id(parameter), []).append(index)
    roles = _Roles(unwrapped(model))
    own = named_parameters(model)
    elsewhere = {id(parameter) for other in others for _, parameter in groups_of(other)}
    facts = tuple(
        replace(_facts(name, one, roles, places, with_gradient), held_elsewhere=id(one) in elsewhere)
        for name, one in own.items()
    )
    known = {id(parameter) for parameter in own.values()}
    strangers = {id(p): p for group in optimizer.param_groups for p in group["params"] if id(p) not in known}
    foreign = tuple(
        ParameterFacts("", shape=_shape(p), dtype=dtype_name(p), groups=tuple(places[id(p)]))
        for p in strangers.values()
    )
    return facts, foreign


def rate_of(group: Mapping[str, Any]) -> float:
    """The rate of a group; NaN where it has none, as where the optimizer finds one by itself."""
    rate = group.get("lr")
    return float(rate) if rate is not None else math.nan


def _facts(
    name: str,
    parameter: nn.Parameter,
    roles: "_Roles",
    places: Mapping[int, list[int]],
    with_gradient: Mapping[int, bool],
) -> ParameterFacts:
    role, inferred = roles.of(parameter)
    # The mark of state-space models, in both of its spellings.
    marks = getattr(parameter, "_optim", None)
    spared = isinstance(marks, Mapping) and marks.get("weight_decay") == 0
    stored = True if parameter.grad is not None else None
    return ParameterFacts(
        name=name,
        module=roles.owners.get(id(parameter), ""),
        role=role,
        inferred=inferred,
        shape=_shape(parameter),
        dtype=dtype_name(parameter),
        requires_grad=parameter.requires_grad,
        groups=tuple(places.get(id(parameter), ())),
        # A step with a batch gives a frozen parameter none; what counts is what it still has.
        has_gradient=with_gradient.get(id(parameter), stored) if parameter.requires_grad else stored,
        asks_no_decay=bool(getattr(parameter, "_no_weight_decay", False)) or spared,
    )


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return () if is_lazy(parameter) else tuple(parameter.shape)


class _Roles:
    """The roles of a model's parameters; a shared one has that of all the modules it stands in."""

    def __init__(self, model: nn.Module) -> None:
        self._told: dict[int, list[Told]] = {}
        self._norm_classes: dict[type, str] = {}
        self.owners: dict[int, str] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, module in modules.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    owner = _behind_parametrization(path, module, modules)
                    self._told.setdefault(id(parameter), []).append(self._role(owner, module, attribute, parameter))
                    self.owners.setdefault(id(parameter), type(owner).__name__)

    def of(self, parameter: nn.Parameter) -> Told:
        told = self._told.get(id(parameter), [Told("other")])
        # An embedding that is also the output layer is a linear map: its decay is what linear maps get.
        return next((one for one in told if one.role == "matrix"), told[0])

    def _role(self, owner: nn.Module, holder: nn.Module, attribute: str, parameter: nn.Parameter) -> Told:
        if is_lazy(parameter):
            return Told("other", "not initialised yet")
        if isinstance(owner, _NORMS):
            return Told("norm bias" if "bias" in attribute else "norm gain")
        if isinstance(owner, _EMBEDDINGS):
            return Told("embedding")
        is_vector = sum(size > 1 for size in parameter.shape) <= 1
        if isinstance(owner, _MAPS):
            # The names are those of torch's own classes; a weight of one row is still a map.
            is_bias = "bias" in attribute
            return Told("bias" if is_bias else "1-d" if is_vector and holder is not owner else "matrix")
        if not is_vector:
            return Told("other", "its module is of no known type")
        return self._vector(owner, attribute)

    def _vector(self, owner: nn.Module, attribute: str) -> Told:
        """A vector in a module that torch does not know."""
        kind = type(owner)
        if kind not in self._norm_classes:
            self._norm_classes[kind] = _why_a_norm(owner)
        why = self._norm_classes[kind]
        if why:
            return Told("norm bias" if "bias" in attribute else "norm gain", why)
        matrices = [one for one in owner._parameters.values() if one is not None and not is_lazy(one) and one.ndim > 1]
        return Told("bias" if attribute == "bias" and matrices else "1-d", "its shape")


def _behind_parametrization(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module whose weight a parametrization computes."""
    if isinstance(module, ParametrizationList):
        return modules.get(path.rpartition(".parametrizations.")[0], module)
    return module


def _why_a_norm(module: nn.Module) -> str:
    """What says that a module of a foreign class normalises: what it does, else its name; empty if nothing does."""
    parameters = [one for one in module.parameters() if not is_lazy(one)]
    vectors = [one for one in parameters if sum(size > 1 for size in one.shape) <= 1]
    if not parameters or len(vectors) < len(parameters) or len({one.numel() for one in parameters}) > 1:
        return ""
    behaves = _is_scale_invariant(module, parameters[0])
    if behaves is not None:
        return "what it does" if behaves else ""
    return "the name of its class" if type(module).__name__.lower().endswith("norm") else ""


def _is_scale_invariant(module: nn.Module, like: Tensor) -> bool | None:
    """Whether a copy of the module gives the same for ``x`` and ``64 x``; None where it cannot be called so."""
    if like.is_meta or like.numel() < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, like.numel(), generator=generator).to(like.device, like.dtype)
    try:
        clone = copy.deepcopy(module).eval()
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.fill_(1.0)
            small, large = clone(x), clone(64 * x)
        if not isinstance(small, Tensor) or small.shape != x.shape:
            return None
        spread = float((small - small.mean()).abs().max())
        return spread > 0 and float((small - large).abs().max()) <= 1e-2 * spread
    except Exception:  # noqa: BLE001 - a stranger's forward may want other arguments; then its name has to do
        return None


def groups_of(optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter]]:
    """Every parameter of the optimizer with the number of its group."""
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield index, parameter
