"""non-finite-gradient: a backward operation made NaN or infinity of finite inputs, for a reason no other rule knows.

What it does:
    Names the first operation of the backward pass whose non-finite output reached a parameter's gradient, and the
    forward operation it differentiates, with what both held at the first offending element.

Why it matters:
    A finite loss says nothing about its gradient; one optimizer step later the weights are lost.
"""

from collections.abc import Iterable

from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe, origin
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.phase != "backward":
        return None
    if not case.op.outputs:
        return Judgement(f"{case.op.op} put a constant there that is not finite")
    facts = case.op.outputs[0]
    of = f", differentiating {case.op.forward_op}," if case.op.forward_op else ""
    message = f"{case.op.op}{of} gave {describe(facts)} from {origin(case.op)}"
    evidence = {"num_nonfinite": facts.num_nonfinite, "num_elements": facts.num_elements}
    held = case.evidence.backward if case.evidence else None
    if held is None or not held.positions:
        return Judgement(message, evidence=evidence)
    where = list(held.positions[0])
    lines = ((case.op.op, _first_values(held.inputs)), (case.op.forward_op, _first_values(held.operands)))
    notes = tuple(f"at {where}, {name} held {values}" for name, values in lines if values)
    return Judgement(message, evidence={**evidence, "first_position": where}, notes=notes)


def _first_values(operands: Iterable[Operand]) -> str:
    """``self 0.5, other 0``: of those whose shape tells which element belongs to the offending one."""
    shown = (operand for operand in operands if operand.facts is not None and operand.at_offenders)
    return ", ".join(f"{operand.name} {operand.at_offenders[0]:.6g}" for operand in shown)


RULE = Rule("NH201", "non-finite-gradient", "unknown", _judge)

_FACTS = (ValueFacts((4,), "float32", num_nan=1),)
_MUL = OpRecord(9, "aten::mul", "birth", "backward", "", None, forward_op="aten::sqrt", outputs=_FACTS)
_HELD = BackwardEvidence(((1,),), (float("nan"),), (Operand("self", _FACTS[0], (0.5,)),))
FLAGGED = (Case(_MUL), Case(_MUL, OffenderEvidence(1, ((1,),), (float("nan"),), backward=_HELD)))
CLEAN = (Case(OpRecord(3, "aten::exp", "birth", "forward", "", None, outputs=_FACTS)),)
