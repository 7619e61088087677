"""half-precision-gradient-overflow: a gradient in float16 is beyond 65,504.

What it does:
    Holds where an operation of the backward pass gave an infinity in float16 of finite numbers, and either the same
    operation in float64 is beyond the type, or the operation is a sum or product, which has no other way to infinity.
    Where it is the sum of a parameter's gradients over several backward passes, it says so. Of what was written over
    in a backward that the user wrote nothing is known, and the rule does not judge.

Why it matters:
    float16 ends at 65,504. With a loss scale of 2**16, a gradient of 1 is already beyond it; without any, sums over
    long sequences and large batches are. A scaler drops such a step and halves the scale: now and then that is how it
    is meant to work; at every step, or at a scale of 1, it is not.

Use instead:
    Parameters and gradients in float32 with ``autocast``, and a ``GradScaler`` that finds its own scale; bfloat16 where
    the device has it, which ends where float32 does; a mean in place of a sum.

References:
    Micikevicius et al. 2018, arXiv:1710.03740.
"""

import math

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.nh212_division_gradient_overflow import exact_values, is_beyond
from nanhunt.rules.registry import Case, Judgement, Rule

# Operations that make infinities of finite numbers in one way only.
_PLAIN = frozenset(("mul", "add", "sub", "neg", "mean", "_to_copy", "copy", "addcmul", "cumprod", "_foreach_add"))
# These add up many terms: NaN comes of partial sums that went beyond the type on either side.
_SUMS = frozenset(
    ("sum", "cumsum", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "addmv", "convolution_backward")
) | frozenset(("embedding_dense_backward", "index_add", "scatter_add"))
# These add in the backward passes of torch, and else put one thing in the place of another.
_PUTS = frozenset(("index_put", "_index_put_impl"))


def overflowed(case: Case) -> tuple[str, tuple[float, ...]] | None:
    """The type that an operation of the backward pass overflowed, and the exact values where they are known."""
    op = case.op
    if op is None or op.phase != "backward" or op.kind != "birth" or op.ingredients or not op.outputs:
        return None
    dtype, exact = op.outputs[0].dtype, exact_values(case)
    held = case.evidence.backward if case.evidence else None
    if dtype not in LIMITS or (held is not None and not all(_is_finite(operand) for operand in held.inputs)):
        return None
    if is_beyond(exact, dtype):
        return dtype, exact
    name = op.op.removeprefix("aten::").removesuffix("_")
    if op.own_backward is not None and (name in _PUTS or _wrote_over(case)):
        return None
    is_sum = name in _SUMS or (name in _PUTS and bool(op.forward_op))
    is_only_way = is_sum or (name in _PLAIN and not op.outputs[0].num_nan)
    return (dtype, ()) if is_only_way else None


def _wrote_over(case: Case) -> bool:
    """Whether the operation adds to, or multiplies, memory of which nothing is known any more."""
    name = case.op.op if case.op is not None else ""
    held = case.evidence.backward if case.evidence else None
    inputs = held.inputs if held is not None else case.evidence.operands if case.evidence else ()
    return name.endswith("_") and name != "aten::copy_" and all(operand.name != "self" for operand in inputs)


def _is_finite(operand: Operand) -> bool:
    if operand.facts is not None:
        return operand.facts.is_finite
    return all(math.isfinite(value) for value in operand.at_offenders)


def judged_overflow(case: Case, dtype: str, exact: tuple[float, ...], help_: str) -> Judgement:
    """What there is to say of an overflow."""
    assert case.op is not None
    facts = case.op.outputs[0]
    positions = case.evidence.backward.positions if case.evidence and case.evidence.backward else ()
    positions = positions or (case.evidence.positions if case.evidence else ())
    evidence: dict[str, object] = {"num_offending": facts.num_nonfinite, "largest_of_type": LIMITS[dtype].max}
    place = ""
    if positions:
        evidence["first_position"] = list(positions[0])
        place = f", first at {list(positions[0])}"
    if exact:
        evidence["exact"] = exact[0]
    elements = count(facts.num_nonfinite, "element")
    limit = f"the {LIMITS[dtype].max:.6g} that {dtype} ends at, for {elements}{place}"
    added = _added_to_parameter(case)
    if added is not None:
        return Judgement(
            f"a gradient of {added:.6g}, added to what earlier backward passes had left, went beyond {limit}",
            evidence={**evidence, "added": added},
            notes=(f"what they had left came to {LIMITS[dtype].max - abs(added):.6g} or more in magnitude",),
            help=(
                "call zero_grad before each step; if gradients are accumulated on purpose, divide the loss by the "
                "number of parts",
                help_,
            ),
        )
    of = f" (backward of {case.op.forward_op})" if case.op.forward_op else ""
    came = f"came to {exact[0]:.6g}" if exact else "went"
    return Judgement(f"{case.op.op}{of} {came} beyond {limit}", evidence=evidence, notes=_checked(case), help=(help_,))


def _added_to_parameter(case: Case) -> float | None:
    """What was added to the gradient that a parameter had from earlier backward passes."""
    held = case.evidence.backward if case.evidence else None
    if case.op is None or held is None or case.op.op != "aten::add_" or held.is_in_hook:
        return None
    added, is_of_parameter = held.at("other"), any(operand.name == "variable" for operand in held.operands)
    return added[0] if added and is_of_parameter else None


def _checked(case: Case) -> tuple[str, ...]:
    """What is known of the inputs."""
    held = case.evidence.backward if case.evidence else None
    if held is None or not held.inputs:
        return ()
    if _wrote_over(case):
        return ("what it added was finite; what was there before has been written over",)
    return ("all of its inputs were finite",)


def _judge(case: Case) -> Judgement | None:
    found = overflowed(case)
    if found is None or found[0] != "float16":
        return None
    return judged_overflow(
        case, *found, "keep this layer and its gradient in float32 or bfloat16, or lower the loss scale"
    )


RULE = Rule("NH219", "half-precision-gradient-overflow", "half-precision-gradient-overflow", _judge)


def overflow_case(op: str, dtype: str, left: float, right: float, **changed: object) -> Case:
    """A product of two numbers that went to infinity."""
    record = OpRecord(
        *(9, f"aten::{op}", "birth", "backward", "head", None),
        forward_op="aten::mul",
        outputs=(ValueFacts((4,), dtype, num_posinf=2),),
        **changed,  # type: ignore[arg-type]
    )
    inputs = (Operand("self", None, (left,)), Operand("other", None, (right,)))
    held = BackwardEvidence(((1,),), (math.inf,), inputs)
    return Case(record, OffenderEvidence(2, ((1,),), (math.inf,), inputs, backward=held))


def _accumulated() -> Case:
    record = OpRecord(
        *(9, "aten::add_", "birth", "backward", "", None), outputs=(ValueFacts((4,), "float16", num_posinf=2),)
    )
    inputs = (Operand("other", None, (30000.0,)),)
    held = BackwardEvidence(((1,),), (math.inf,), inputs, (Operand("variable", None, (0.5,)),))
    return Case(record, OffenderEvidence(2, ((1,),), (math.inf,), inputs, backward=held))


def _put(own_backward: SourceLine | None, forward_op: str = "aten::index") -> Case:
    record = OpRecord(
        *(9, "aten::index_put_", "birth", "backward", "", None),
        forward_op=forward_op,
        outputs=(ValueFacts((4,), "float16", num_posinf=2),),
        own_backward=own_backward,
    )
    inputs = (Operand("values", None, (30000.0,)),)
    held = BackwardEvidence(((1,),), (math.inf,), inputs)
    return Case(record, OffenderEvidence(2, ((1,),), (math.inf,), inputs, backward=held))


_PLAIN_CASES = (overflow_case("mul", "float16", 4096.0, 30.0), overflow_case("add_", "float16", 40000.0, 40000.0))
FLAGGED = (*_PLAIN_CASES, _accumulated(), _put(None))
CLEAN = (
    _put(SourceLine("model.py", 13, "out[index] = gradient")),
    _put(None, ""),
    overflow_case("mul", "float32", 1e30, 1e30),
    overflow_case("div", "float16", 1.0, 0.0),
    overflow_case("mul", "float16", math.inf, 1.0, ingredients=(3,)),
    overflow_case("mul", "float16", math.inf, 1.0),
)
