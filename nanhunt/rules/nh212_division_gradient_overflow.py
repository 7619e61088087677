"""division-gradient-overflow: the gradient of a quotient by a tiny number is beyond the largest number of its type.

What it does:
    Works out the operation of the backward pass of ``div``, ``reciprocal``, ``rsqrt`` or a logarithm in float64. The
    rule holds only if nothing was divided by 0, and the exact result is beyond the type. It tells the slope where that
    is what overflowed, else its product with the gradient that came in.

Why it matters:
    The slope of 1 / x is 1 / x**2, that of ``rsqrt`` goes with the power 3/2: where the forward pass has room for
    another ten orders of magnitude, the backward pass has none. In float32, 1 / x fails from 5.4e-20 downwards.

Example:
    ``(1 / torch.tensor(1e-30, requires_grad=True)).backward()``

Use instead:
    An eps in the divisor that is large against 1e-20 in float32, 1e-3 in float16: ``x / (norm + eps)``; for ``rsqrt``
    an eps under the root, for a logarithm ``log_softmax`` or ``logsigmoid`` of the logits.
"""

import math
from typing import NamedTuple

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import OfTorch, of_torch
from nanhunt.rules.registry import Case, Judgement, Rule

# Functions that divide, and the argument they divide by.
_DIVISORS = {"div": "other", "reciprocal": "result", "rsqrt": "result", "log": "self", "log2": "self", "log10": "self"}
_INVERSES = {"reciprocal": -1.0, "rsqrt": -2.0}

_OF_LOG = "add an eps to the argument of the logarithm, or work on the logits: log_softmax, logsigmoid"
_HELP = {
    "div": "add an eps to the divisor before the division, or work out the quotient of logarithms",
    "reciprocal": "add an eps to the divisor before the division",
    "rsqrt": "add an eps to the argument of rsqrt, as a norm layer does",
    **dict.fromkeys(("log", "log2", "log10"), _OF_LOG),
}


def exact_values(case: Case) -> tuple[float, ...]:
    """What the operation gives in float64 at the positions of ``backward``; empty where that cannot be told.

    Too large for float64 counts as infinite.
    """
    held = case.evidence.backward if case.evidence else None
    if case.op is None or held is None or case.evidence is None:
        return ()
    left, right = held.at("self"), held.at("other") or held.at("exponent")
    name = case.op.op.removeprefix("aten::").removesuffix("_")
    if name == "_to_copy":
        return left
    if name in ("mul", "div", "pow") and left and len(left) == len(right):
        return tuple(_computed(name, a, b) for a, b in zip(left, right, strict=True))
    if case.evidence.exact and held.positions == case.evidence.positions:
        return tuple(exact.value for exact in case.evidence.exact)
    return ()


def _computed(name: str, left: float, right: float) -> float:
    """NaN where there is no value, as for a division by 0."""
    try:
        return left * right if name == "mul" else left / right if name == "div" else left**right
    except ZeroDivisionError:
        return math.nan
    except OverflowError:
        return math.inf


def is_beyond(values: tuple[float, ...], dtype: str) -> bool:
    """Whether there are values, and all are beyond the largest number of the type."""
    return dtype in LIMITS and bool(values) and all(abs(value) > LIMITS[dtype].max for value in values)


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function not in _DIVISORS or not found.op.outputs:
        return None
    dtype, exact = found.op.outputs[0].dtype, exact_values(case)
    if found.op.ingredients or not is_beyond(exact, dtype):
        return None
    assert case.evidence is not None
    number, where = case.evidence.num_offending, list(found.held.positions[0])
    values = found.held.held(_DIVISORS[found.function])
    divisor = values[0] ** _INVERSES.get(found.function, 1.0) if values and values[0] != 0 else None
    by = f" at {divisor:.6g}" if divisor is not None else ""
    told, limit = _told(found, exact[0]), LIMITS[dtype].max
    evidence: dict[str, object] = {"num_offending": number, "first_position": where, "exact": told.value}
    if divisor is not None:
        evidence["divisor"] = divisor
    way = f", worked out by way of {exact[0]:.6g}," if abs(told.value) <= limit else ""
    at = f"for {count(number, 'element')}, first at {where}"
    return Judgement(
        f"{told.what} of {found.function}{by} is {told.value:.6g}{way} {at}, and {dtype} ends at {limit:.6g}",
        evidence={**evidence, "largest_of_type": limit},
        help=(_HELP[found.function],),
    )


class _Told(NamedTuple):
    """What went beyond the type: the slope alone, or its product with the gradient that came in."""

    what: str
    value: float


def _told(found: OfTorch, exact: float) -> _Told:
    left, right = found.held.at("self"), found.held.at("other")
    result = found.held.held("result")
    if found.function == "rsqrt" and found.name == "pow":
        return _Told("slope", -0.5 * exact)
    if found.function == "reciprocal" and result and left[:1] == right[:1] == result[:1]:
        return _Told("slope", -exact)
    numerator, divisor = found.held.held("self"), found.held.held("other")
    is_known = found.function == "div" and numerator and divisor and divisor[0] != 0.0
    # The slope in the divisor divides the quotient once more; the gradient of the numerator divides what came in.
    if is_known and math.isclose(left[0], numerator[0] / divisor[0], rel_tol=0.01):
        return _Told("slope", -exact)
    return _Told("gradient", exact)


RULE = Rule("NH212", "division-gradient-overflow", "division-gradient-overflow", _judge)


def _case(op: str, of: str, left: float, right: float, **held: float) -> Case:
    record = OpRecord(
        *(9, f"aten::{op}", "birth", "backward", "", None),
        forward_op=f"aten::{of}",
        outputs=(ValueFacts((2,), "float32", num_posinf=1),),
    )
    inputs = (Operand("self", None, (left,)), Operand("other", None, (right,)))
    operands = tuple(Operand(name, None, (value,)) for name, value in held.items())
    backward = BackwardEvidence(((0,),), (math.inf,), inputs, operands)
    return Case(record, OffenderEvidence(1, ((0,),), (math.inf,), inputs, backward=backward))


FLAGGED = (_case("mul", "reciprocal", 1e30, 1e30, result=1e30), _case("div", "div", 1e27, 1e-30, other=1e-30))
CLEAN = (
    _case("div", "div", 1.0, 0.0, other=0.0),
    _case("mul", "mul", 1e30, 1e30),
    _case("mul", "reciprocal", 1e10, 1e10, result=1e10),
)
