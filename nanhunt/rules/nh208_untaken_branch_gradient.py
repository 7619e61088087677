"""untaken-branch-gradient: a function with an infinite slope was differentiated where nothing of its result was used.

What it does:
    Holds where the gradient that came in was exactly 0 and the slope infinite, and where every operation that read the
    result leaves elements out: ``where``, ``masked_fill``, indexing with a mask, ``gather``, ``max``. A bound on the
    result, such as ``clamp``, is no branch: the rule of the function holds, and says that the bound comes too late.
    Where the function itself gave an infinity, as a division by 0 does, the rule holds if the only harm of it is that
    the backward pass multiplied it by such a gradient.

Why it matters:
    The forward pass selects the good branch, and the loss is finite. The backward pass goes through both: it hands the
    other one a gradient of 0, and 0 times infinity is NaN.

Example:
    ``torch.where(x > 0, x.log(), 0.0).sum().backward()`` with an ``x`` of 0

Use instead:
    ``torch.where(ok, torch.where(ok, x, 1.0).log(), 0.0)``: a harmless input where the branch is not taken.

Known limits:
    Autograd frees the mask before the branch is differentiated, so that the operation is known and not its mask: a
    gradient that is 0 for another reason, below a ``where``, is taken for one that it cut. Of a finite result the rule
    asks that the gradient is not 0 everywhere, and that no product lies between, which could have made it 0; where the
    result was infinite, something must have left it out. Below an activation such as ``relu`` the rule of the function
    itself holds, as it does where the branch that is not taken is NaN in the forward pass already.

References:
    pytorch#23395, pytorch#52248, pytorch#68425.
"""

import math
from typing import NamedTuple

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, Sink, Trace, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.source_words import lost_numbers

# Functions whose backward pass divides the gradient that came in by something that is 0 where the slope is infinite.
_QUOTIENTS = frozenset(("sqrt", "log", "log2", "log10", "log1p", "atanh"))

# Those that are infinite there themselves, as a division by 0 is; and what they divide by.
_POLES = {"div": "other", "log": "other", "log2": "other", "log10": "other", "log1p": "other", "atanh": "other"}

_BOUNDS = frozenset(("clamp", "maximum", "minimum", "fmax", "fmin"))


class ZeroGradients(NamedTuple):
    """Offending elements at which the gradient that came in was 0 and the slope infinite.

    Attributes:
        number: How many.
        is_zero_elsewhere: Whether no other element's gradient is known to be other than 0.
    """

    number: int
    is_zero_elsewhere: bool


class OfTorch(NamedTuple):
    """A backward operation of torch's own, with what it held."""

    op: OpRecord
    name: str
    function: str
    held: BackwardEvidence


def of_torch(case: Case) -> OfTorch | None:
    """The offender where it is a backward operation that the user did not write, and what it held is known."""
    op, held = case.op, case.evidence.backward if case.evidence else None
    if op is None or op.phase != "backward" or op.own_backward is not None or not op.forward_op or held is None:
        return None
    if not held.positions or held.is_in_hook:
        return None
    return OfTorch(op, _short(op.op), _short(op.forward_op), held)


def all_equal(values: tuple[float, ...], wanted: float) -> bool:
    """Whether there are values and all are this one."""
    return bool(values) and all(value == wanted for value in values)


def zero_gradients(case: Case) -> ZeroGradients | None:
    """Where 0 met an infinite slope; None if that is not known or nowhere so."""
    found = of_torch(case)
    if found is None or not found.op.outputs:
        return None
    gradient: tuple[float, ...] = found.held.at("grad_output")
    if found.name == "div" and found.function in (*_QUOTIENTS, "div") and all_equal(found.held.at("other"), 0.0):
        # Of a quotient it may be the numerator as well, which comes to the same: 0 / 0, in a result that is left out.
        gradient = found.held.at("self")
    if all_equal(gradient, 0.0) and all(value != value for value in found.held.made):
        return _counted(found.op.outputs[0])
    later = (record for record in case.trace.ops if record.op in ("aten::mul", "aten::mul_") and record.outputs)
    # The slope was infinite by itself; a product with the gradient makes NaN of it only where that is 0.
    product = next((record for record in later if _multiplies(record, found.op)), None)
    return _counted(product.outputs[0]) if product is not None else None


def zero_notes(case: Case) -> tuple[str, ...]:
    """What there is to say where the gradient that came in was 0, but who cut it is not known for sure."""
    zeros, found = zero_gradients(case), of_torch(case)
    if zeros is None or found is None:
        return ()
    if found.held.cut_by in _BOUNDS:
        return (f"the gradient that came in was 0 there: {found.held.cut_by} bounds the result, which is too late",)
    if found.held.cut_by:
        return (f"the gradient that came in was 0 there, and {found.held.cut_by} is what read the result",)
    return ("the gradient that came in was 0 there: if a mask cuts this branch off, it must act on the input as well",)


def lost_in_half(case: Case) -> tuple[str, ...]:
    """What there is to say on a small constant of the line where the gradient is in float16."""
    is_half = case.op is not None and bool(case.op.outputs) and case.op.outputs[0].dtype == "float16"
    lost = lost_numbers(case, "float16") if is_half else ()
    smallest = LIMITS["float16"].smallest_subnormal / 2
    return (f"the {lost[-1]:g} in this line is 0 in float16, as anything below {smallest:.3g} is",) if lost else ()


def _counted(facts: ValueFacts) -> ZeroGradients:
    return ZeroGradients(facts.num_nan, not facts.abs_max and not facts.num_posinf and not facts.num_neginf)


def _multiplies(record: OpRecord, op: OpRecord) -> bool:
    """Whether it is the product of the infinite slope with a gradient, and met a 0."""
    is_same = record.forward_index is not None and record.forward_index == op.forward_index
    return is_same and record.kind == "birth" and op.index in record.ingredients and record.outputs[0].num_nan > 0


def _short(name: str) -> str:
    return name.removeprefix("aten::").removesuffix("_")


def _judge(case: Case) -> Judgement | None:
    if case.op is not None and case.op.phase == "forward":
        return _of_infinite_result(case)
    found, zeros = of_torch(case), zero_gradients(case)
    if found is None or zeros is None or (zeros.is_zero_elsewhere and not _is_at_pole(found)):
        return None
    number, where, cut = zeros.number, list(found.held.positions[0]), found.held.cut_by
    if not cut or cut in _BOUNDS:
        return None
    arguments = found.held.held("self")
    evidence: dict[str, object] = {"num_offending": number, "first_position": where, "cut_by": cut}
    if arguments and found.function != "div":
        evidence["argument"] = arguments[0]
    assert case.evidence is not None
    others = case.evidence.num_offending - number
    notes = (f"{count(others, 'more element')} had a gradient other than 0, and overflowed",) if others > 0 else ()
    return Judgement(
        f"gradient of {found.function} for {count(number, 'element')} that {cut} leaves out, first at {where}: "
        "0 times infinity",
        evidence=evidence,
        notes=("the forward pass takes nothing of these elements, so it is finite", *notes),
        help=(_remedy(found.function),),
    )


def _remedy(function: str) -> str:
    if function in ("div", "reciprocal"):
        return "give the division a harmless divisor there, first: x / torch.where(ok, divisor, 1)"
    return f"give {function} a harmless argument there, first: {function}(torch.where(ok, x, ...))"


def _is_at_pole(found: OfTorch) -> bool:
    """Whether the function was infinite there, so that the loss is finite only if something left it out."""
    return found.name == "div" and found.function in _POLES and all_equal(found.held.at(_POLES[found.function]), 0.0)


def _of_infinite_result(case: Case) -> Judgement | None:
    """Where the forward pass drops an infinity, and the backward pass multiplies it by the gradient 0."""
    op, evidence = case.op, case.evidence
    held = evidence.backward if evidence is not None else None
    if op is None or evidence is None or held is None or not held.cut_by or held.cut_by in _BOUNDS or held.is_in_hook:
        return None
    spoilt = [r for r in case.trace.ops if r.phase == "backward" and r.kind == "birth" and op.index in r.ingredients]
    harmed = [sink for sink in case.trace.sinks if op.index in sink.births]
    is_only_harm = all(any(record.index in sink.births for record in spoilt) for sink in harmed)
    if (
        not spoilt
        or not is_only_harm
        or not _is_zero_times_infinity(held)
        or not all(map(math.isinf, evidence.results))
    ):
        return None
    number, where, function = spoilt[0].outputs[0].num_nan, list(held.positions[0]), _short(op.op)
    return Judgement(
        f"{function} is infinite for {count(number, 'element')} that {held.cut_by} leaves out, first at {where}; the "
        "backward pass multiplies it by a gradient of 0",
        evidence={"num_offending": number, "first_position": where, "cut_by": held.cut_by},
        notes=("the forward pass takes nothing of these elements",),
        help=(_remedy(function),),
    )


def _is_zero_times_infinity(held: BackwardEvidence) -> bool:
    pairs = list(zip(held.at("self"), held.at("other"), strict=False))
    return bool(pairs) and all({abs(one), abs(other)} == {0.0, math.inf} for one, other in pairs)


_SAY_LESS = ("NH103", "NH107", "NH108", "NH109", "NH112", "NH202")
RULE = Rule("NH208", "untaken-branch-gradient", "untaken-branch-gradient", _judge, goes_before=_SAY_LESS)

_NAN = float("nan")
_DIV = OpRecord(
    *(9, "aten::div", "birth", "backward", "", None),
    forward_index=3,
    forward_op="aten::log",
    outputs=(ValueFacts((3,), "float32", num_nan=1, abs_max=2.5),),
)
_RSQRT = OpRecord(
    *(9, "aten::rsqrt", "birth", "backward", "", None),
    forward_index=3,
    forward_op="aten::acos",
    outputs=(ValueFacts((3,), "float32", num_posinf=1, abs_max=1.2),),
)


def _divided(gradient: float, cut_by: str) -> Case:
    made = _NAN if gradient == 0 else float("inf")
    inputs = (Operand("self", None, (gradient,)), Operand("other", None, (0.0,)))
    held = BackwardEvidence(((1,),), (made,), inputs, (Operand("self", None, (0.0,)),), cut_by)
    return Case(_DIV, OffenderEvidence(1, ((1,),), (made,), inputs, backward=held))


def _multiplied(*, by_zero: bool) -> Case:
    facts = ValueFacts((3,), "float32", num_nan=int(by_zero), num_neginf=int(not by_zero), abs_max=1.2)
    product = OpRecord(
        *(11, "aten::mul", "birth", "backward", "", None),
        forward_index=3,
        forward_op="aten::acos",
        outputs=(facts,),
        ingredients=(9,),
    )
    held = BackwardEvidence(((1,),), (float("inf"),), (Operand("self", None, (0.0,)),), cut_by="where")
    evidence = OffenderEvidence(1, ((1,),), (float("inf"),), backward=held)
    return Case(_RSQRT, evidence, Trace(20, (_RSQRT, product)))


def _infinite(cut_by: str, *, reaches_loss: bool = False) -> Case:
    op = OpRecord(
        *(3, "aten::reciprocal", "birth", "forward", "", None),
        outputs=(ValueFacts((3,), "float32", num_posinf=1),),
    )
    product = OpRecord(
        *(11, "aten::mul", "birth", "backward", "", None),
        forward_index=3,
        forward_op="aten::reciprocal",
        outputs=(ValueFacts((3,), "float32", num_nan=1, abs_max=1.2),),
        ingredients=(3,),
    )
    inputs = (Operand("self", None, (-0.0,)), Operand("other", None, (math.inf,)))
    held = BackwardEvidence(((1,),), (_NAN,), inputs, cut_by=cut_by)
    evidence = OffenderEvidence(1, ((1,),), (math.inf,), (Operand("self", None, (0.0,)),), backward=held)
    gradient = Sink("gradient", "weight", product.outputs[0], (3, 11))
    loss = (Sink("loss", "loss", op.outputs[0], (3,)),) if reaches_loss else ()
    return Case(op, evidence, Trace(20, (op, product), sinks=(*loss, gradient)))


FLAGGED = (_infinite("where"), _divided(0.0, "where"), _divided(0.0, "indexing"), _multiplied(by_zero=True))
_OTHERS = (_divided(0.0, ""), _divided(0.0, "clamp"), _divided(1.0, "where"))
CLEAN = (
    *_OTHERS,
    _infinite(""),
    _infinite("clamp"),
    _infinite("where", reaches_loss=True),
    _multiplied(by_zero=False),
    Case(_DIV, None),
)
