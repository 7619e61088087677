"""What an operand was made by, as far as autograd remembers it: where a zero in a small type comes from."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt.records.evidence import Producer

_SMALL = (torch.float16, torch.bfloat16)
_MAX_NODES = 8

# What comes out as 0 went in as 0, at the same place; a difference from one constant is followed through as well.
_KEEPS_ZERO = {"Sqrt", "Abs", "Neg", "Alias", "Clone", "View", "Reshape", "UnsafeView"}
_DIFFERENCES = {"Sub", "Rsub"}


def producers(operand: Tensor, position: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Producer, ...]:
    """The operations that made one element of an operand in a small type, the last one first.

    Args:
        operand: The operand.
        position: Index of the element in the output that it broadcasts to.
        shape: Shape of that output.

    Returns:
        None of them where no gradient is wanted of the operand.
    """
    if operand.dtype not in _SMALL or operand.grad_fn is None or len(operand.shape) > len(shape):
        return ()
    tail = position[len(position) - operand.dim() :]
    place = tuple(0 if size == 1 else index for size, index in zip(operand.shape, tail, strict=True))
    try:
        with torch.no_grad():
            return tuple(_walk(operand.grad_fn, tuple(operand.shape), place))
    except (AttributeError, IndexError, RuntimeError):
        # The graph has been freed, or holds a node of another kind.
        return ()


def _walk(node: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Iterator[Producer]:
    for _ in range(_MAX_NODES):
        if node is None or not _is_of_shape(node, shape):
            return
        name = _name(node)
        inputs = [following for following, _ in node.next_functions]
        yield Producer(
            op=_op(name),
            dtype=str(node._input_metadata[0].dtype).removeprefix("torch."),
            numbers=(*_bounds(node, name, place), *_start(name, inputs, place)),
            of=tuple(_op(_name(following)) for following in inputs if following is not None),
            lost=_lost(node, name, inputs, place),
        )
        if name == "Where":
            node = inputs[0 if bool(node._saved_condition.expand(shape)[place]) else 1]
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
    given = node._saved_self[place]
    for bound in ("min", "max"):
        number = getattr(node, f"_saved_{bound}", None)
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
        result = getattr(inputs[0], "_saved_result", None)
        if isinstance(result, Tensor):
            exact = float(result[place])
        elif _name(inputs[0]) == "Mul" and _is_of_shape(inputs[0], tuple(node._input_metadata[0].shape)):
            exact = _product(inputs[0], place)
    return exact or None


def _start(name: str, inputs: list[Any], place: tuple[int, ...]) -> Iterator[tuple[str, float, float]]:
    """What a sum was before something without a gradient was added."""
    known = [getattr(one, "_saved_result", None) for one in inputs if one is not None]
    if name == "Add" and len(known) == 1 and isinstance(known[0], Tensor):
        start = float(known[0][place])
        yield "start", start, start


def _product(node: Any, place: tuple[int, ...]) -> float | None:
    factors = [node._saved_self, node._saved_other]
    if any(factor is None for factor in factors):
        return None
    shape = torch.broadcast_shapes(*(factor.shape for factor in factors))
    left, right = (float(factor.expand(shape)[place]) for factor in factors)
    return left * right
