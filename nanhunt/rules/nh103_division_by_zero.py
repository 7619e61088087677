"""division-by-zero: the offending elements were divided by exactly zero.

What it does:
    Looks at the divisor at the offending elements of ``div`` and at the argument of ``reciprocal``, ``rsqrt`` and
    negative powers. The rule holds only if it is 0 at all of them.

Why it matters:
    x / 0 is infinite and 0 / 0 is NaN; either spreads.

Known limits:
    In a backward pass only the gradient of a quotient is meant: the gradients of roots and eigenvectors divide by
    zero as well, for reasons of their own, which have their own rules. A backward that the user wrote is judged like a
    forward pass.
"""

from dataclasses import replace
from typing import Any

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_DIVISORS = {
    "div": "other",
    "div_": "other",
    "reciprocal": "self",
    "rsqrt": "self",
    "reciprocal_": "self",
    "rsqrt_": "self",
}


def _judge(case: Case) -> Judgement | None:
    if case.op is None:
        return None
    is_torchs = case.op.phase == "backward" and case.op.own_backward is None
    if is_torchs and (case.op.forward_op or "").removeprefix("aten::") not in _DIVISORS:
        return None
    name = case.op.op.removeprefix("aten::")
    divisor = case.operand(_DIVISORS[name]) if name in _DIVISORS else None
    if divisor is None or not divisor.at_offenders or any(value != 0.0 for value in divisor.at_offenders):
        return None
    assert case.evidence is not None
    number = case.evidence.num_offending
    where = case.evidence.positions[0]
    of = f" (backward of {case.op.forward_op})" if case.op.forward_op else ""
    return Judgement(
        f"{case.op.op}{of} divided by 0 at {count(number, 'element')}, first at {list(where)}",
        evidence={"num_offending": number, "first_position": list(where), "divisor": 0.0},
        help=("keep the divisor away from 0 where it is made, before any root or quotient",),
    )


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
