"""What the user's line says of the numbers that went into an operation, where nothing else remembers them."""

import ast
from collections.abc import Iterator

from nanhunt.numerics import LIMITS
from nanhunt.rules.offender import base_name
from nanhunt.rules.registry import Case

# Names under which a line calls an operation that divides or takes a logarithm.
_CALLS = {"div": ("div", "divide", "true_divide"), "reciprocal": ("reciprocal",), "rsqrt": ("rsqrt",)} | {
    name: (name,) for name in ("log", "log2", "log10")
}

# Of these the result is 0 where what they were called on is 0.
_KEEPS_ZERO = ("sqrt", "abs", "detach", "clone", "unsqueeze", "squeeze", "expand", "expand_as", "view", "reshape")
_MODULES = ("torch", "F", "np", "numpy", "math")


def lost_numbers(case: Case, dtype: str) -> tuple[float, ...]:
    """Numbers above 0 written in the line that are 0 in this type."""
    tree = _tree(case)
    found = [_lost(node, dtype) for node in ast.walk(tree)] if tree is not None else []
    return tuple(sorted({value for value in found if value is not None}))


def lost_in_sum(case: Case, dtype: str) -> float | None:
    """The number that the line adds to what it divides by, or takes the logarithm of, where it is 0 in this type.

    None where any division or logarithm of the line is of something else, as nobody knows then which of them it was.
    """
    arguments = [_bare(node) for node in _arguments(case)]
    sums = [node for node in arguments if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)]
    found = [_lost(side, dtype) for node in sums for side in (node.left, node.right)]
    lost = [value for value in found if value is not None]
    return lost[0] if lost and len(lost) == len(arguments) else None


def is_of_difference_from_one(case: Case) -> bool:
    """Whether every logarithm of the line is of 1 minus something."""
    arguments = [_bare(node) for node in _arguments(case)]
    return bool(arguments) and all(
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and _number(node.left) == 1.0 for node in arguments
    )


def is_nanmean(case: Case) -> bool:
    """Whether the only division of the line is the one inside ``nanmean``."""
    tree = _tree(case)
    nodes = list(ast.walk(tree)) if tree is not None else []
    divides = any(
        isinstance(node, ast.Div) or (isinstance(node, ast.Attribute) and "div" in node.attr) for node in nodes
    )
    return not divides and any(isinstance(node, ast.Attribute) and node.attr == "nanmean" for node in nodes)


def _tree(case: Case) -> ast.Module | None:
    line = (case.op.own_backward or case.op.source) if case.op is not None else None
    try:
        return ast.parse(line.text.strip()) if line is not None else None
    except (SyntaxError, ValueError, RecursionError):
        # Part of a statement over several lines.
        return None


def _arguments(case: Case) -> Iterator[ast.expr]:
    """What the line divides by, or takes the logarithm of, if that is what the operation does; numbers apart."""
    tree, base = _tree(case), base_name(case)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and base in ("div", "reciprocal"):
            if _number(node.right) is None:
                yield node.right
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr in _CALLS.get(base, ()):
                given = node.args if isinstance(owner, ast.Name) and owner.id in _MODULES else [owner, *node.args]
                yield from given[1:2] if base == "div" else given[:1]


def _bare(node: ast.expr) -> ast.expr:
    """Without the calls around it that keep a zero."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _KEEPS_ZERO:
        owner = node.func.value
        is_function = isinstance(owner, ast.Name) and owner.id in _MODULES
        if is_function and not node.args:
            return node
        node = node.args[0] if is_function else owner
    return node


def _lost(node: ast.AST, dtype: str) -> float | None:
    number = _number(node)
    is_lost = number is not None and dtype in LIMITS and 0.0 < number < LIMITS[dtype].smallest_subnormal / 2
    return number if is_lost else None


def _number(node: ast.AST) -> float | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
