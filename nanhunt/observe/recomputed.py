"""What an operation gives in float64 at the elements where it went non-finite.

Only the offending elements of sums of products are computed, each from the row and the column it is made of; other
reductions are run again whole, up to a bound. What could draw random numbers or change anything is not run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanhunt.observe.modes import untraced
from nanhunt.observe.op_info import FocusedOp
from nanhunt.records.evidence import Exact

MAX_ELEMENTS = 2**22
"""Elements that may be computed with again, over all inputs."""

MAX_PRODUCTS = 2**26
"""Products that make up one product of the matrices of which a function is computed again."""

Position = tuple[int, ...]

_CONVERSIONS = {"_to_copy": "self", "copy_": "src"}
_POINTWISE_NAMES = """add sub rsub mul div square pow exp exp2 expm1 sinh cosh reciprocal rsqrt addcmul addcdiv lerp
softplus ldexp hypot logaddexp lgamma i0 special_i1"""
_REDUCTION_NAMES = """sum nansum mean cumsum prod cumprod linalg_vector_norm norm mse_loss smooth_l1_loss huber_loss
l1_loss var std index_add scatter_add _cdist_forward _weight_norm_interface avg_pool1d avg_pool2d
linalg_cross"""
_POINTWISE = frozenset(_POINTWISE_NAMES.split())
_REDUCTIONS = frozenset(_REDUCTION_NAMES.split())
_OF_MATRICES = ("linalg_matrix_exp", "_linalg_det")
_NORMS = ("linalg_vector_norm", "norm", "_cdist_forward")
_SUMS = ("sum", "nansum", "cumsum", "mean", "index_add", "scatter_add")


def recomputed(op: FocusedOp, at: int, positions: list[Position]) -> tuple[Exact, ...]:
    """The elements in float64; none where that cannot be told.

    Args:
        op: The operation.
        at: Which of its outputs is non-finite.
        positions: Indices into that output.
    """
    try:
        with untraced(), torch.no_grad():
            return tuple(_computed(op, at, positions))
    except Exception:  # noqa: BLE001 - an operation may refuse float64 or these arguments; then nothing is known
        return ()


def _computed(op: FocusedOp, at: int, positions: list[Position]) -> list[Exact]:
    name = op.op.removeprefix("aten::")
    values = dict(zip(op.schema_names, op.args, strict=False)) | op.kwargs
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if any(tensor.is_complex() or tensor.layout is not torch.strided for tensor in tensors):
        return []
    shape = tuple(op.outputs[at].shape)
    if name in _CONVERSIONS:
        source = values[_CONVERSIONS[name]].expand(shape)
        return [Exact(float(source[position])) for position in positions]
    if op.op == name or (name.endswith("_") and op.args[0] is None):
        # An operation of the user's, or one that has written over what it was given.
        return []
    if name in _PRODUCTS:
        return [_PRODUCTS[name](values, position) for position in positions]
    if name in _POINTWISE:
        return [Exact(_pointwise(name, op, shape, position)) for position in positions]
    if name in _REDUCTIONS and sum(tensor.numel() for tensor in tensors) <= MAX_ELEMENTS:
        return _reduced(name, op, values, at, positions)
    if name in _OF_MATRICES and tensors[0].numel() * tensors[0].shape[-1] <= MAX_PRODUCTS:
        return _of_matrices(name, op, at, positions)
    return []


def _run(name: str, args: Any, kwargs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Runs the operation on changed tensors, with a result in float64."""
    changed = [change(value) if isinstance(value, Tensor) else value for value in args]
    kept = {
        key: change(value) if isinstance(value, Tensor) else torch.float64 if key == "dtype" else value
        for key, value in kwargs.items()
        if key != "out" and value is not None
    }
    return getattr(torch.ops.aten, name)(*changed, **kept)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.detach()


def _pointwise(name: str, op: FocusedOp, shape: Position, position: Position) -> float:
    return float(_run(name, op.args, op.kwargs, lambda tensor: _wide(tensor.expand(shape)[position])))


def _reduced(name: str, op: FocusedOp, values: Any, at: int, positions: list[Position]) -> list[Exact]:
    if name in ("var", "std") and values["self"].numel() // op.outputs[at].numel() < 2:
        # Nothing to compute, and torch would warn a second time.
        return []
    results = _run(name, op.args, op.kwargs, _wide)
    result = results if isinstance(results, Tensor) else results[at]
    terms = _run(name, op.args, op.kwargs, lambda tensor: _magnitudes(tensor)) if name in _SUMS else None
    num_terms = max(1, values["self"].numel() // max(1, result.numel())) if "self" in values else 1
    found = []
    for position in positions:
        value = float(result[position])
        if terms is not None:
            largest = float(terms[position]) * (num_terms if name == "mean" else 1)
        else:
            largest = _inside(name, value, num_terms, values)
        found.append(Exact(value, largest))
    return found


def _of_matrices(name: str, op: FocusedOp, at: int, positions: list[Position]) -> list[Exact]:
    """An element of a function of a matrix is made of all of it; on the way are numbers as large as the largest."""
    results = _run(name, op.args, op.kwargs, _wide)
    result = results if isinstance(results, Tensor) else results[at]
    if name == "_linalg_det":
        return [Exact(float(result[position])) for position in positions]
    largest = result.abs().amax((-2, -1))
    return [Exact(float(result[position]), float(largest[position[:-2]])) for position in positions]


def _magnitudes(tensor: Tensor) -> Tensor:
    return _wide(tensor).abs() if tensor.is_floating_point() else tensor.detach()


def _inside(name: str, value: float, num_terms: int, values: Any) -> float:
    """The largest number on the way to a result that is smaller: the square in a norm, the sum in a mean."""
    if name in ("linalg_vector_norm", "norm", "_cdist_forward") and values.get("ord", values.get("p")) in (
        2,
        2.0,
        None,
    ):
        return value * value
    if name == "mse_loss" and values.get("reduction", 1) == 1:
        return value * num_terms
    if name in ("var", "std"):
        return (value if name == "var" else value * value) * num_terms
    return 0.0


# Sums of products.


def _sum_of_products(left: Tensor, right: Tensor, start: float = 0.0, beta: Any = 1, alpha: Any = 1) -> Exact:
    if left.numel() > MAX_ELEMENTS:
        raise ValueError("too many terms")
    left, right = _wide(left).flatten(), _wide(right).flatten()
    terms = left * right
    first = float(beta) * start if beta else 0.0
    is_new_nan = terms.isnan() & ~left.isnan() & ~right.isnan()
    return Exact(
        value=float(terms.sum()) * float(alpha) + first,
        largest=float(terms.abs().sum()) * abs(float(alpha)) + abs(first),
        num_zero_times_infinity=int(is_new_nan.sum()),
        num_infinite=int(terms.isinf().sum()),
    )


def _plain(left: str, right: str) -> Callable[[Any, Position], Exact]:
    """Row of one matrix times column of the other, of a batch or not; a vector has neither."""

    def product(values: Any, position: Position) -> Exact:
        a, b = values[left], values[right]
        if a.dim() == 1:
            return _sum_of_products(a, b)
        row = a[position[:-1]] if b.dim() > 1 else a[position]
        column = b[(*position[:-2], slice(None), position[-1])] if b.dim() > 1 else b
        return _sum_of_products(row, column)

    return product


def _added(left: str, right: str) -> Callable[[Any, Position], Exact]:
    """The same with something added."""
    product = _plain(left, right)

    def added(values: Any, position: Position) -> Exact:
        plain, alpha, beta = product(values, position), values.get("alpha", 1), values.get("beta", 1)
        a, b = values[left], values[right]
        shape = (*a.shape[:-1], b.shape[-1]) if b.dim() > 1 else a.shape[:-1]
        first = float(values["self"].expand(shape)[position]) * float(beta) if beta else 0.0
        return Exact(
            plain.value * float(alpha) + first,
            plain.largest * abs(float(alpha)) + abs(first),
            plain.num_zero_times_infinity,
            plain.num_infinite,
        )

    return added


def _linear(values: Any, position: Position) -> Exact:
    bias = values.get("bias")
    start = float(bias[position[-1]]) if bias is not None else 0.0
    return _sum_of_products(values["input"][position[:-1]], values["weight"][position[-1]], start)


def _convolution(values: Any, position: Position) -> Exact:
    """The patch under the kernel times the kernel; padding has no terms."""
    if values["transposed"]:
        raise ValueError("transposed")
    sample, channel, *place = position
    weight = values["weight"][channel]
    group = channel // (values["weight"].shape[0] // values["groups"])
    patch = values["input"][sample, group * weight.shape[0] : (group + 1) * weight.shape[0]]
    steps = [list(values[name]) * (len(place) if len(values[name]) == 1 else 1) for name in ("stride", "padding")]
    dilation = list(values["dilation"]) * (len(place) if len(values["dilation"]) == 1 else 1)
    for axis, at in enumerate(place):
        first = at * steps[0][axis] - steps[1][axis]
        taken = [first + number * dilation[axis] for number in range(weight.shape[axis + 1])]
        inside = [number for number, index in enumerate(taken) if 0 <= index < patch.shape[axis + 1]]
        patch = patch.index_select(axis + 1, torch.tensor([taken[n] for n in inside], device=patch.device))
        weight = weight.index_select(axis + 1, torch.tensor(inside, device=weight.device))
    start = float(values["bias"][channel]) if values.get("bias") is not None else 0.0
    return _sum_of_products(patch, weight, start)


_PRODUCTS: dict[str, Callable[[Any, Position], Exact]] = {
    "mm": _plain("self", "mat2"),
    "bmm": _plain("self", "mat2"),
    "mv": _plain("self", "vec"),
    "dot": _plain("self", "tensor"),
    "vdot": _plain("self", "other"),
    "addmm": _added("mat1", "mat2"),
    "baddbmm": _added("batch1", "batch2"),
    "addmv": _added("mat", "vec"),
    "linear": _linear,
    "convolution": _convolution,
}
