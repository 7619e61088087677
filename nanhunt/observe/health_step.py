"""One sampled step of the health probe: extremes of tensors and gradients, kept on their device until it is over."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nanhunt.numerics import LIMITS
from nanhunt.observe.finite import stored_values, unreadable_kind
from nanhunt.observe.modes import untraced
from nanhunt.observe.readings import Readings
from nanhunt.records.health import Extent, ModuleSample, ParameterSample, StepHealth, UpdateCount

MAX_SCALARS = 40_000
"""Numbers kept of one step; a loop that never steps must not fill the memory."""

# Weights compared before and after an optimizer step: of a few parameters, or of many where that looked odd.
_FEW, _MANY, _ELEMENTS = 2, 64, 1024

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128))
_SCALARS = (bool, int, float, str)
_PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)

Names = Mapping[int, str]


@contextmanager
def unseen() -> Iterator[None]:
    """Without autograd and without the modes that may be following the training."""
    with torch.no_grad(), untraced():
        yield


class _Seen:
    """A tensor looked at once, in whatever modules it turns up: where its extremes and those of its gradients are."""

    __slots__ = ("dtype", "gradients", "place", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int, place: int) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = version
        self.dtype = tensor.dtype
        self.place = place
        self.gradients: list[tuple[int, torch.dtype]] = []


@dataclasses.dataclass
class _Watched:
    """Some elements of a parameter before the optimizer step."""

    parameter: Tensor
    stride: int
    before: Tensor
    has_gradient: Tensor


class SampledStep:
    """Collects while the step runs; after ``close`` it holds numbers only."""

    def __init__(
        self,
        names: Names,
        step: int,
        on_problem: Callable[[Exception], None],
        *,
        is_deep: bool,
        counts_zeros: bool,
        is_thorough: bool,
    ) -> None:
        """Begins to look.

        Args:
            names: Module names by ``id``.
            step: Step.
            on_problem: What to do with a failure of the probe.
            is_deep: Whether to look at every gradient and at the updates, not only at the norm.
            counts_zeros: Whether to count the zero and subnormal elements of gradients.
            is_thorough: Whether to compare weights of many parameters.
        """
        self.step = step
        self.is_deep = is_deep
        self._names = names
        self._on_problem = on_problem
        self._counts_zeros = counts_zeros
        self._is_thorough = is_thorough
        self._readings = Readings()
        self._by_id: dict[int, _Seen] = {}
        self._roles: dict[str, list[tuple[bool, _Seen]]] = {}
        self._gradients: list[tuple[str, torch.dtype, int, int, int, int | None]] = []
        self._norms: list[int] = []
        self._watched: list[_Watched] = []
        self._counts: list[int] = []
        self._lr: float | None = None
        self._is_open = True
        self._values: list[float] = []
        self._leaf_hooks: list[Any] = []

    def stop(self) -> None:
        """Takes the tensor hooks away."""
        self._is_open = False
        for hook in self._leaf_hooks:
            hook.remove()

    def read(self) -> None:
        """Reads everything, once per device, and lets go of all tensors."""
        self._by_id, self._watched, self._leaf_hooks = {}, [], []
        readings, self._readings = self._readings, Readings()
        self._values = readings.read()

    # Modules and their gradients

    def look_at(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Looks at what a module was given and gave."""
        name = self._names.get(id(module))
        if name is None:
            return
        try:
            roles = self._roles.get(name)
            if roles is None:
                roles = self._roles[name] = []
            returned = _tensors(output)
            for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
                # What an in-place module was given is known from where it came from, if at all.
                is_overwritten = any(tensor is other for other in returned)
                seen = self._by_id.get(id(tensor)) if is_overwritten else self._seen(tensor)
                if seen is not None and seen.tensor() is tensor:
                    roles.append((True, seen))
            for tensor in returned:
                seen = self._seen(tensor)
                if seen is not None:
                    roles.append((False, seen))
        except Exception as problem:  # noqa: BLE001 - whatever goes wrong here is ours and must not end the training
            self._on_problem(problem)

    def _seen(self, tensor: Tensor) -> _Seen | None:
        """What is known of the tensor at its present version; None if it cannot be looked at."""
        version = -1 if tensor.is_inference() else tensor._version
        seen = self._by_id.get(id(tensor))
        if seen is not None and seen.version == version and seen.tensor() is tensor:
            return seen
        if not self._has_room or not _is_readable(tensor):
            return None
        seen = self._by_id[id(tensor)] = _Seen(tensor, version, self._extremes(tensor))
        if self.is_deep and tensor.requires_grad:
            # A view whose base was written to has no gradient function until somebody asks, and a hook on it would
            # end the process (pytorch#196459).
            is_leaf = tensor.grad_fn is None
            hook = tensor.register_hook(self._gradient_hook(seen.gradients))
            if is_leaf:
                # Those of other tensors go with the graph.
                self._leaf_hooks.append(hook)
        return seen

    @property
    def _has_room(self) -> bool:
        return self._is_open and self._readings.num_scalars < MAX_SCALARS

    def _extremes(self, tensor: Tensor) -> int:
        if torch._C._len_torch_dispatch_stack():
            with untraced():
                return self._readings.add(*torch.aminmax(_real(tensor)))
        return self._readings.add(*torch.aminmax(_real(tensor)))

    def _gradient_hook(self, found: list[tuple[int, torch.dtype]]) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            try:
                with torch._C.DisableTorchFunction():
                    if self._has_room and _is_readable(gradient):
                        found.append((self._extremes(gradient), gradient.dtype))
            except Exception as problem:  # noqa: BLE001 - as above
                self._on_problem(problem)

        return look

    # The optimizer step

    def see_gradients(self, optimizer: Optimizer, names: Names) -> None:
        """Looks at the gradients, and keeps some weights to compare."""
        pairs = []
        for group in optimizer.param_groups:
            found = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            usable = [(parameter, stored_values(gradient)) for parameter, gradient in found if _is_readable(gradient)]
            pairs += usable
            if usable:
                self._lr = max(self._lr or 0.0, float(group["lr"]))
        if not pairs:
            return
        with unseen():
            gradients = [gradient for _, gradient in pairs]
            # Half gradients would overflow in their own type above a norm of 65504.
            wide = any(gradient.dtype in (torch.float16, torch.bfloat16) for gradient in gradients)
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32 if wide else None)
            place = self._readings.add(*norms)
            self._norms += range(place, place + len(gradients))
            if self.is_deep:
                for number, (parameter, gradient) in enumerate(pairs):
                    self._see_gradient(names.get(id(parameter), f"parameter {number}"), parameter, gradient)
                self._watch(pairs)

    def _see_gradient(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        values = _real(gradient)
        place, counts = self._readings.add(*torch.aminmax(values)), None
        if self._counts_zeros:
            is_small = values.abs() < torch.finfo(values.dtype).tiny
            counts = self._readings.add(torch.count_nonzero(values), torch.count_nonzero(is_small))
        num_elements = parameter.numel() * (2 if gradient.is_complex() else 1)
        self._gradients.append((name, values.dtype, num_elements, values.numel(), place, counts))

    def _watch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        dense = [(parameter, gradient) for parameter, gradient in pairs if parameter.shape == gradient.shape]
        number = min(len(dense), _MANY if self._is_thorough else _FEW)
        for place in range(number):
            parameter, gradient = dense[place * len(dense) // number]
            stride = max(1, parameter.numel() // _ELEMENTS)
            before = _some(parameter, stride).clone()
            self._watched.append(_Watched(parameter, stride, before, _some(gradient, stride) != 0))

    def see_updates(self) -> None:
        """Looks at what the optimizer step changed."""
        with unseen():
            for watched in self._watched:
                moved = watched.has_gradient
                changed = (_some(watched.parameter, watched.stride) != watched.before) & moved
                parts = [moved, changed]
                if self._is_thorough:
                    sizes = watched.before.abs()
                    large = sizes >= sizes.median()
                    parts += [moved & large, changed & large]
                self._counts.append(self._readings.add(*(part.sum() for part in parts)))
        self._watched.clear()

    # What was collected

    @property
    def health(self) -> StepHealth:
        """The step as a whole."""
        return StepHealth(self.step, self._norm, self._lr, self._updates)

    @property
    def gradient_norms(self) -> list[float]:
        """Norm of each parameter's gradient."""
        return [self._values[place] for place in self._norms]

    @property
    def largest_value(self) -> float:
        """Largest finite absolute value that any module gave."""
        values = self._values
        places = {seen.place for roles in self._roles.values() for is_input, seen in roles if not is_input}
        found = (max(-values[place], values[place + 1]) for place in places)
        return max((value for value in found if math.isfinite(value)), default=0.0)

    def parameters(self) -> Iterator[tuple[str, str, int, ParameterSample]]:
        """Name, element type, number of elements and sample of every gradient."""
        for name, dtype, num_elements, num_stored, place, counts in self._gradients:
            zeros = subnormals = None
            if counts is not None:
                # What a sparse gradient does not store is zero.
                nonzero, small = self._values[counts], self._values[counts + 1]
                zeros, subnormals = 1 - nonzero / num_elements, (small - (num_stored - nonzero)) / num_elements
            sample = ParameterSample(self.step, _magnitude(self._values, place), zeros, subnormals)
            yield name, _name(dtype), num_elements, sample

    def modules(self) -> Iterator[tuple[str, ModuleSample]]:
        """Name and sample of every module, in program order."""
        for name, roles in self._roles.items():
            extents: dict[str, list[Extent]] = {}
            for is_input, seen in roles:
                side = "input" if is_input else "output"
                extents.setdefault(side, []).append(self._extent(seen.place, seen.dtype))
                for place, dtype in seen.gradients:
                    extents.setdefault(f"{side}_gradient", []).append(self._extent(place, dtype))
            yield name, ModuleSample(self.step, **{role: _union(found) for role, found in extents.items()})

    def _extent(self, place: int, dtype: torch.dtype) -> Extent:
        return Extent(self._values[place], self._values[place + 1], _name(dtype))

    @property
    def _norm(self) -> float | None:
        if not self._norms:
            return None
        norm = math.hypot(*self.gradient_norms)
        if math.isfinite(norm) or not self._gradients:
            return norm
        # Squares of finite float32 gradients overflow above 1.8e19; the largest elements bound the norm from below.
        return math.hypot(*(_magnitude(self._values, gradient[4]) for gradient in self._gradients))

    @property
    def _updates(self) -> UpdateCount | None:
        if not self._counts:
            return None
        width = 4 if self._is_thorough else 2
        totals = [int(sum(self._values[place + part] for place in self._counts)) for part in range(width)]
        watched, changed, watched_large, changed_large = (*totals, 0, 0)[:4]
        return UpdateCount(watched, changed, watched_large, changed_large, self._is_thorough)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in what a module was given or gave."""
    if isinstance(values, Tensor):
        return [values]
    if type(values) is not tuple:
        return _nested_tensors(values)
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif value is not None and type(value) not in _SCALARS:
            tensors += _nested_tensors(value)
    return tensors


def _nested_tensors(values: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            tensors += [tensor for value in vars(leaf).values() for tensor in _tensors(value)]
    return tensors


def _is_readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without side effects."""
    if type(tensor) not in _PLAIN_TYPES or tensor.dtype not in _DTYPES or tensor.numel() == 0:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor._is_zerotensor():
        return False
    if tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested:
        return True
    if unreadable_kind(tensor) is not None:
        return False
    if tensor.layout is torch.sparse_coo:
        return stored_values(tensor).numel() > 0
    # Nothing may be read back from a graph that is being captured.
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _real(tensor: Tensor) -> Tensor:
    """The values without autograd, complex ones as pairs."""
    values = stored_values(tensor).detach() if tensor.layout is torch.sparse_coo else tensor.detach()
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _some(tensor: Tensor, stride: int) -> Tensor:
    return tensor.detach().reshape(-1)[::stride]


def _magnitude(values: list[float], place: int) -> float:
    low, high = values[place], values[place + 1]
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _union(extents: list[Extent]) -> Extent:
    """The extremes over the tensors of the element type that comes nearest to its limit."""
    finite = [extent for extent in extents if extent.is_finite]
    if len(finite) < len(extents):
        # One that is not finite says all there is to say.
        return next(extent for extent in extents if not extent.is_finite)
    nearest = max(finite, key=lambda extent: extent.magnitude / _limit(extent.dtype)).dtype
    alike = [extent for extent in finite if extent.dtype == nearest]
    return Extent(min(extent.low for extent in alike), max(extent.high for extent in alike), nearest)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _limit(dtype: str) -> float:
    return LIMITS[dtype].max if dtype in LIMITS else math.inf
