"""What an operand was made by, as far as autograd remembers it: where a zero or a negative number comes from."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt.observe.saved import saved
from nanhunt.records.evidence import Producer

_MAX_NODES = 12

Place = tuple[int, ...]

# What comes out as 0 went in as 0, at the same place; a difference from one constant is followed through as well.
_KEEPS_ZERO = {"Sqrt", "Abs", "Neg"}
_DIFFERENCES = {"Sub", "Rsub"}


def producers(operand: Tensor, position: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Producer, ...]:
    """The operations that made one element of an operand, the last one first; those that only move it are left out.

    Args:
        operand: The operand.
        position: Index of the element in the output that it broadcasts to.
        shape: Shape of that output.

    Returns:
        None of them where no gradient is wanted of the operand.
    """
    if not operand.is_floating_point() or operand.grad_fn is None or len(operand.shape) > len(shape):
        return ()
    tail = position[len(position) - operand.dim() :]
    place = tuple(0 if size == 1 else index for size, index in zip(operand.shape, tail, strict=True))
    try:
        with torch.no_grad():
            return tuple(_walk(operand.grad_fn, tuple(operand.shape), place))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # The graph has been freed, or holds a node of another kind.
        return ()


def _walk(node: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Iterator[Producer]:
    for _ in range(_MAX_NODES):
        if node is None or not _is_of_shape(node, shape):
            return
        name = _name(node)
        inputs = [following for following, _ in node.next_functions]
        if name in _MOVES:
            shape, place = _MOVES[name](node, shape, place)
            node = inputs[0]
            continue
        yield Producer(
            op=_op(name),
            dtype=str(node._input_metadata[0].dtype).removeprefix("torch."),
            numbers=(*_bounds(node, name, place), *_start(name, inputs, place), *_terms(name, inputs, shape, place)),
            of=tuple(_op(_name(following)) for following in inputs if following is not None),
            lost=_lost(node, name, inputs, place),
        )
        if name == "Where":
            node = inputs[0 if bool(saved(node, "condition").expand(shape)[place]) else 1]
        elif name in _KEEPS_ZERO or (name in _DIFFERENCES and sum(one is not None for one in inputs) == 1):
            node = next(one for one in inputs if one is not None)
        else:
            return


def _is_of_shape(node: Any, shape: tuple[int, ...]) -> bool:
    metadata: Any = getattr(node, "_input_metadata", ())
    return len(metadata) == 1 and tuple(metadata[0].shape) == shape


def _name(node: Any) -> str:
    return re.sub(r"Backward[0-9]*$", "", node.name().rpartition("::")[2])


def _op(name: str) -> str:
    """``linalg_vector_norm`` for ``LinalgVectorNorm``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _bounds(node: Any, name: str, place: tuple[int, ...]) -> Iterator[tuple[str, float, float]]:
    """The bound of a clamp that holds at this element, as it was written and as the type stores it."""
    if name not in ("Clamp", "ClampMin", "ClampMax"):
        return
    given = saved(node, "self")[place]
    for bound in ("min", "max"):
        number = saved(node, bound)
        if isinstance(number, float | int):
            stored = float(torch.tensor(number, dtype=given.dtype))
            if (float(given) <= stored) if bound == "min" else (float(given) >= stored):
                yield bound, float(number), stored


def _lost(node: Any, name: str, inputs: list[Any], place: tuple[int, ...]) -> float | None:
    """What a product or a conversion had to round, where that is more than 0."""
    exact = None
    if name == "Mul":
        exact = _product(node, place)
    elif name == "ToCopy" and len(inputs) == 1 and inputs[0] is not None:
        result = saved(inputs[0], "result")
        if isinstance(result, Tensor):
            exact = float(result[place])
        elif _name(inputs[0]) == "Mul" and _is_of_shape(inputs[0], tuple(node._input_metadata[0].shape)):
            exact = _product(inputs[0], place)
    return exact or None


def _start(name: str, inputs: list[Any], place: tuple[int, ...]) -> Iterator[tuple[str, float, float]]:
    """What a sum was before something without a gradient was added."""
    known = [saved(one, "result") for one in inputs if one is not None]
    if name == "Add" and len(known) == 1 and isinstance(known[0], Tensor):
        start = float(known[0][place])
        yield "start", start, start


def _terms(name: str, inputs: list[Any], shape: Place, place: Place) -> Iterator[tuple[str, float, float]]:
    """What a difference was taken of, as far as it is a power or a product that autograd can form again."""
    for one in inputs if name in _DIFFERENCES else ():
        if one is None or not _is_of_shape(one, shape):
            continue
        if _name(one) == "Pow":
            term = float(saved(one, "self")[place]) ** float(one._saved_exponent)
        else:
            term = _product(one, place) if _name(one) == "Mul" else None
        if term is not None:
            yield "term", term, term


# What only moves an element: the shape and the place it had before.


def _at_offset(place: Place, shape: Place, before: Place) -> Place:
    """The place in another shape with the same elements in the same order."""
    offset = 0
    for index, size in zip(place, shape, strict=True):
        offset = offset * size + index
    found = []
    for size in reversed(before):
        found.append(offset % size)
        offset //= size
    return tuple(reversed(found))


def _reshaped(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    before = tuple(node._saved_self_sym_sizes)
    return before, _at_offset(place, shape, before)


def _expanded(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    before = tuple(node._saved_self_sym_sizes)
    tail = place[len(shape) - len(before) :]
    return before, tuple(0 if size == 1 else index for size, index in zip(before, tail, strict=True))


def _unsqueezed(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    dim = _signed(node._saved_dim) % len(shape)
    return (*shape[:dim], *shape[dim + 1 :]), (*place[:dim], *place[dim + 1 :])


def _transposed(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    order = list(range(len(shape)))
    if len(order) > 1:
        first, second = (_signed(getattr(node, f"_saved_dim{n}", n)) % len(order) for n in (0, 1))
        order[first], order[second] = order[second], order[first]
    return tuple(shape[dim] for dim in order), tuple(place[dim] for dim in order)


def _permuted(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    dims = [_signed(dim) % len(shape) for dim in node._saved_dims]
    where = [dims.index(dim) for dim in range(len(dims))]
    return tuple(shape[dim] for dim in where), tuple(place[dim] for dim in where)


def _selected(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    before = tuple(node._saved_self_sym_sizes)
    dim = _signed(node._saved_dim) % len(before)
    return before, (*place[:dim], _signed(node._saved_index) % before[dim], *place[dim:])


def _sliced(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    before = tuple(node._saved_self_sym_sizes)
    dim, start = _signed(node._saved_dim) % len(before), _signed(node._saved_start)
    start = max(0, start + before[dim] if start < 0 else start)
    return before, (*place[:dim], start + place[dim] * node._saved_step, *place[dim + 1 :])


def _gathered(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    before = tuple(saved(node, "self").shape)
    dim = _signed(node._saved_dim) % len(before)
    return before, (*place[:dim], int(saved(node, "index")[place]), *place[dim + 1 :])


def _kept(node: Any, shape: Place, place: Place) -> tuple[Place, Place]:
    return shape, place


def _signed(number: int) -> int:
    """A whole number as it was given; autograd hands negative ones out as unsigned."""
    return number - 2**64 if number >= 2**63 else number


_MOVES: dict[str, Callable[[Any, Place, Place], tuple[Place, Place]]] = {
    **dict.fromkeys(("View", "Reshape", "UnsafeView", "ReshapeAlias", "Squeeze"), _reshaped),
    **dict.fromkeys(("Alias", "Clone"), _kept),
    **dict.fromkeys(("T", "Transpose"), _transposed),
    "Expand": _expanded,
    "Unsqueeze": _unsqueezed,
    "Permute": _permuted,
    "Select": _selected,
    "Slice": _sliced,
    "Gather": _gathered,
}


def _product(node: Any, place: tuple[int, ...]) -> float | None:
    factors = [saved(node, "self"), saved(node, "other")]
    if any(factor is None for factor in factors):
        return None
    shape = torch.broadcast_shapes(*(factor.shape for factor in factors))
    left, right = (float(factor.expand(shape)[place]) for factor in factors)
    return left * right
