"""One pass through a model: how large what its layers and activation functions give is, and the gradients."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from nanhunt.audit.init_weights import weight_of
from nanhunt.observe.values import tensors_of
from nanhunt.records.init_audit import ActivationPass, LayerPass

_ACTIVATIONS = {
    "relu": "relu",
    "relu_": "relu",
    "threshold": "relu",
    "tanh": "tanh",
    "tanh_": "tanh",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
_SLOPE = {"tanh": 0.02, "sigmoid": 0.005}
"""Slopes below these count as none: |tanh x| > 0.99; a sigmoid outside of 0.005 to 0.995, so that the prior of 0.01
with which detectors begin does not count."""

Activation = tuple[str, str, str]
"""Module, function, and the layer before it."""


class Looks(TorchDispatchMode):
    """Looks at a model while it runs; its results are in ``layers``, ``activations``, ``output`` and ``has_run``.

    Args:
        model: Is run inside ``watching``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers: dict[str, LayerPass] = {}
        self.gradients: dict[str, float] = {}
        self.activations: dict[Activation, ActivationPass] = {}
        self.output: LayerPass | None = None
        self.input_varies = False
        self.has_run = False
        self._running: list[str] = []
        self._hooked: set[str] = set()
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at what runs inside; gradients are heard of until the pass is forgotten."""
        handles = [handle for module in self.names for handle in self._follow(module)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, LayerPass]:
        """The layers with their gradients, in the order in which they ran first."""
        return {
            name: LayerPass(
                *(seen.input_rms, seen.output_rms, seen.variation),
                *(self.gradients.get(name), seen.num_nonfinite, seen.rounding),
            )
            for name, seen in self.layers.items()
        }

    def _follow(self, module: nn.Module) -> list[RemovableHandle]:
        name = self.names[module]
        is_layer = bool(name) and is_followed(module)
        look: Callable[..., None] = self._see_root if not name else self._see_layer if is_layer else _ignore

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.has_run = True
            self._running.append(name)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            look(name, module, (args, kwargs), output)

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True),
        ]

    def _see_root(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        result = first_float(output)
        if self.output is None and result is not None:
            self.output = look_at(given, result)
            if not self.layers and is_followed(module):
                self._see_layer(name, module, given, output)
            inputs = list(tensors_of(given))
            self.input_varies = any(_varies(tensor) for tensor in inputs)

    def _see_layer(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        result = first_float(output)
        if result is None:
            return
        if name not in self.layers:
            self.layers[name] = look_at(given, result)
            self._outputs[id(result)] = (weakref.ref(result), name)
        if result.requires_grad and name not in self._hooked:
            self._hooked.add(name)
            result.register_hook(lambda gradient: self._see_gradient(name, gradient))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = _norm(gradient.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _ACTIVATIONS.get(func.overloadpacket.__name__)
        if name is None:
            return func(*args, **(kwargs or {}))
        reference, layer = self._outputs.get(id(args[0]), (None, ""))
        is_direct = reference is not None and reference() is args[0]
        key = (self._running[-1] if self._running else "", name, layer)
        if not is_direct or key in self.activations:
            return func(*args, **(kwargs or {}))
        mean, std = _moments(args[0])
        output = func(*args, **(kwargs or {}))
        self.activations[key] = _look_at_activation(name, output, mean, std, self._unit_dim(layer))
        return output

    def _unit_dim(self, layer: str) -> int:
        """Where units are: second for convolutions and their normalisations, else last."""
        module = self.model.get_submodule(layer)
        channels = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
        return 1 if isinstance(module, channels) else -1


def is_followed(module: nn.Module) -> bool:
    """Whether it is a layer: it has no parts, or is torch's own and has a weight itself."""
    is_leaf = next(module.children(), None) is None
    is_own = isinstance(module, nn.MultiheadAttention)
    return (is_leaf and not isinstance(module, nn.Identity)) or (is_own and weight_of(module) is not None)


def first_float(value: Any) -> Tensor | None:
    """The first floating-point tensor in what a module gave; a loss that stands before it is passed over."""
    found = [tensor for tensor in tensors_of(value) if tensor.is_floating_point() and tensor.numel()]
    return next((tensor for tensor in found if tensor.dim()), found[0] if found else None)


def look_at(given: Any, output: Tensor) -> LayerPass:
    """How large input and output are."""
    with torch.no_grad():
        source, result = first_float(given), output.detach()
        return LayerPass(
            input_rms=_rms(source.detach()) if source is not None else None,
            output_rms=_rms(result),
            variation=variation(result),
            num_nonfinite=result.numel() - int(torch.isfinite(result).sum()),
            rounding=_rms(result) * torch.finfo(result.dtype).eps,
        )


def variation(tensor: Tensor) -> float | None:
    """Root mean square of the difference from the mean over the first axis with more than one element."""
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() < 2 or tensor.shape[0] < 2:
        return None
    wide = tensor.double()
    return _rms(wide - wide.mean(0))


def _look_at_activation(name: str, output: Tensor, mean: float, std: float, dim: int) -> ActivationPass:
    units = output.shape[dim] if output.dim() > 1 else 1
    observations = output.numel() // max(units, 1)
    num_dead, saturated = 0, 0.0
    if name == "relu":
        others = [axis for axis in range(output.dim()) if axis != dim % output.dim()]
        num_dead = int((output == 0).all(dim=others).sum()) if others else 0
    else:
        slope = 1 - output.square() if name == "tanh" else output * (1 - output)
        saturated = float((slope < _SLOPE[name]).double().mean())
    return ActivationPass(observations, units, num_dead, saturated, mean, std)


def _moments(tensor: Tensor) -> tuple[float, float]:
    wide = tensor.double()
    return float(wide.mean()), float(wide.std(correction=0))


def _varies(tensor: Tensor) -> bool:
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.dim() > 1 and tensor.shape[0] > 1 and bool((tensor != tensor[:1]).any())


def _rms(tensor: Tensor) -> float:
    return _norm(tensor) / math.sqrt(max(tensor.numel(), 1))


def _norm(tensor: Tensor) -> float:
    # In double precision: the squares of what has vanished are 0 in single precision.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _ignore(*args: Any) -> None:
    return None
