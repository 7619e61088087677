"""opposite-infinities: infinities of opposite sign met in a sum of gradients.

What it does:
    Looks at the two terms of an ``add`` or ``sub`` in the backward pass. The rule holds only if at the offending
    elements both are infinite, and they cancel.

Why it matters:
    Autograd adds up what the branches of a graph send back. +inf from one and -inf from another give NaN, which belongs
    to neither.

Use instead:
    Look at the branches: the report names the operations that made the infinities.
"""

import math

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_SIGNS = {"add": 1.0, "sub": -1.0}


def _judge(case: Case) -> Judgement | None:
    held = case.evidence.backward if case.evidence else None
    if case.op is None or case.op.phase != "backward" or held is None or not case.op.outputs:
        return None
    sign = _SIGNS.get(case.op.op.removeprefix("aten::").removesuffix("_"))
    left, right = held.at("self"), held.at("other")
    if sign is None or not left or len(left) != len(right):
        return None
    if not all(math.isinf(a) and a == -sign * b for a, b in zip(left, right, strict=True)):
        return None
    number, where = case.op.outputs[0].num_nan, list(held.positions[0])
    made = [record for index in case.op.ingredients if (record := case.trace.op_at(index)) is not None]
    names = " and ".join(_place(record) for record in made[:2])
    met = f"{left[0]:+} and {sign * right[0]:+}"
    return Judgement(
        f"{met} met in a sum of gradients at {count(number, 'element')}, first at {where}",
        evidence={"num_offending": number, "first_position": where},
        notes=(f"the infinities come from {names}",) if names else (),
        help=("look at where the infinities come from: the sum itself is innocent",),
    )


def _place(record: OpRecord) -> str:
    of = f" (backward of {record.forward_op})" if record.forward_op else ""
    return f"{record.op}{of}" + (f" at line {record.source.line}" if record.source else "")


RULE = Rule("NH221", "opposite-infinities", "opposite-infinities", _judge)

_ADD = OpRecord(
    *(9, "aten::add", "birth", "backward", "", None),
    outputs=(ValueFacts((2,), "float32", num_nan=1),),
    ingredients=(3,),
)


def _added(left: float, right: float) -> Case:
    inputs = (Operand("self", None, (left,)), Operand("other", None, (right,)))
    held = BackwardEvidence(((0,),), (math.nan,), inputs)
    return Case(_ADD, OffenderEvidence(1, ((0,),), (math.nan,), inputs, backward=held))


FLAGGED = (_added(math.inf, -math.inf), _added(-math.inf, math.inf))
CLEAN = (_added(math.inf, 1.0), _added(1e38, 3e38), Case(_ADD, None))
