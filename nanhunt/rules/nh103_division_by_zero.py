"""division-by-zero: the offending elements were divided by exactly zero.

What it does:
    Looks at the divisor at the offending elements of ``div``, ``remainder``, ``fmod`` and ``softplus``, at the argument
    of ``reciprocal`` and ``rsqrt``, and at the vectors that ``weight_norm`` divides by their length. The rule holds
    only if it is 0 at all of them.

Why it matters:
    x / 0 is infinite and 0 / 0 is NaN; either spreads.

Known limits:
    In a backward pass only the gradient of a quotient is meant: the gradients of roots and eigenvectors divide by
    zero as well, for reasons of their own, which have their own rules. A backward that the user wrote is judged like a
    forward pass.
"""

import math
from dataclasses import replace
from typing import Any

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.offender import base_name
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.source_words import lost_numbers

_DIVISORS = {
    "div": "other",
    "remainder": "other",
    "fmod": "other",
    "softplus": "beta",
    "reciprocal": "self",
    "rsqrt": "self",
    "addcdiv": "tensor2",
}


def _judge(case: Case) -> Judgement | None:
    if case.op is None or (is_torchs_backward(case) and (case.op.forward_op or "") not in _QUOTIENTS):
        return None
    if case.op.phase in ("clip", "optimizer") and ("_foreach_" in case.op.op or "addcdiv" in case.op.op):
        # The update of an optimizer of torch's, which has its own rules.
        return None
    divisor = divisor_of(case)
    if divisor is None or not divisor.at_offenders or any(value != 0.0 for value in divisor.at_offenders):
        return None
    assert case.evidence is not None
    number = case.evidence.num_offending
    where = case.evidence.positions[0]
    of = f" (backward of {case.op.forward_op})" if case.op.forward_op else ""
    return Judgement(
        f"{case.op.op}{of} divided by 0 at {count(number, 'element')}, first at {list(where)}",
        evidence={"num_offending": number, "first_position": list(where), "divisor": 0.0},
        notes=_notes(case, divisor),
        help=("keep the divisor away from 0 where it is made, before any root or quotient",),
    )


_QUOTIENTS = tuple(f"aten::{name}" for name in ("div", "div_", "reciprocal", "reciprocal_", "rsqrt", "rsqrt_"))


def is_torchs_backward(case: Case) -> bool:
    """Whether torch, not the user, wrote this part of the backward pass."""
    return case.op is not None and case.op.phase == "backward" and case.op.own_backward is None


def divisor_of(case: Case) -> Operand | None:
    """What the operation divides by; None for one that divides by nothing."""
    name = base_name(case)
    if name == "_weight_norm_interface":
        results = case.evidence.results if case.evidence is not None else ()
        # Of a vector with a length, a zero would give 0.
        return case.operand("v") if all(math.isnan(result) for result in results) else None
    return case.operand(_DIVISORS[name]) if name in _DIVISORS else None


def _notes(case: Case, divisor: Operand) -> tuple[str, ...]:
    if divisor.facts is None or divisor.facts.dtype != "float16":
        return ()
    lost = lost_numbers(case, "float16")
    if not lost:
        return ()
    smallest = LIMITS["float16"].smallest_subnormal / 2
    return (f"the {lost[-1]:g} in this line is 0 in float16, as anything below {smallest:.3g} is",)


RULE = Rule("NH103", "division-by-zero", "division-by-zero", _judge)

_DIV = OpRecord(5, "aten::div", "birth", "forward", "norm", None, outputs=(ValueFacts((2,), "float32", num_nan=1),))


def _divided_by(value: float, **changed: Any) -> Case:
    operands = (Operand("self", None, (0.0,)), Operand("other", ValueFacts((2,), "float32"), (value,)))
    return Case(replace(_DIV, **changed), OffenderEvidence(1, ((1,),), (float("nan"),), operands))


_OWN = SourceLine("model.py", 13, "return gradient / norm")

FLAGGED = (
    _divided_by(0.0),
    _divided_by(0.0, phase="backward", forward_op="aten::linalg_vector_norm", own_backward=_OWN),
)
CLEAN = (_divided_by(1e-30), Case(_DIV, None), _divided_by(0.0, phase="backward", forward_op="aten::_linalg_eigh"))
