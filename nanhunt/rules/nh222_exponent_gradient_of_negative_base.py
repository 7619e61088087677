"""exponent-gradient-of-negative-base: the gradient of a power in its exponent was taken where the base is negative.

What it does:
    Looks at the logarithm of the base that the backward pass of ``x ** p`` takes where ``p`` wants a gradient. The rule
    holds only if at the offending elements the base is negative.

Why it matters:
    The slope of ``x ** p`` in ``p`` is ``x ** p * log(x)``, and a negative number has no real logarithm. With a whole
    ``p``, as in ``(-2.0) ** 2.0``, the forward pass is fine all the same.

Example:
    ``(torch.tensor([-2.0]) ** torch.tensor(2.0, requires_grad=True)).backward()``

Use instead:
    A plain number, or ``p.detach()``, for an exponent that is not learned; ``x.abs() ** p``, times ``x.sign()`` where
    the sign is to stay, for one that is. A mask on the result does not help: 0 times NaN is NaN.
"""

import math

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import OfTorch, of_torch
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function != "pow" or not _takes_log_of_negative(found):
        return None
    assert case.evidence is not None
    number, where = case.evidence.num_offending, list(found.held.positions[0])
    bases, exponents = found.held.at("self") if found.name == "log" else (), found.held.held("exponent")
    evidence: dict[str, object] = {"num_offending": number, "first_position": where}
    if bases:
        evidence["base"] = bases[0]
    if exponents:
        evidence["exponent"] = exponents[0]
    base = f"the base {bases[0]:.6g}" if bases else "a negative base"
    cut = found.held.cut_by
    masked = (f"{cut} leaves these elements out, which does not help: 0 times NaN is NaN",) if cut else ()
    return Judgement(
        f"gradient of x ** p in p at {base} for {count(number, 'element')}, first at {where}: log of a negative number",
        evidence=evidence,
        notes=masked,
        help=(
            "make the exponent a plain number, or detach it, if it is not learned",
            "take the power of x.abs(), and multiply by x.sign() if the sign is to stay",
        ),
    )


def _takes_log_of_negative(found: OfTorch) -> bool:
    bases = found.held.at("self")
    if found.name == "log":
        return bool(bases) and all(base < 0.0 for base in bases)
    # Of a base that is a plain number, autograd takes the logarithm by itself: NaN only if it is negative, or NaN.
    other = next((operand for operand in found.held.inputs if operand.name == "other"), None)
    is_number = other is not None and other.facts is None and all(map(math.isnan, other.at_offenders))
    return found.name == "mul" and is_number and bool(bases) and all(map(math.isfinite, bases))


RULE = Rule("NH222", "exponent-gradient-of-negative-base", "exponent-gradient-of-negative-base", _judge)

_FACTS = ValueFacts((3,), "float32", num_nan=1, abs_max=1.1)


def _case(op: str, of: str, *inputs: Operand) -> Case:
    record = OpRecord(*(9, op, "birth", "backward", "", None), forward_op=of, outputs=(_FACTS,))
    held = BackwardEvidence(((1,),), (math.nan,), inputs, (Operand("exponent", None, (2.0,)),))
    return Case(record, OffenderEvidence(1, ((1,),), (math.nan,), inputs, backward=held))


_RESULT = Operand("self", _FACTS, (4.0,))
FLAGGED = (
    _case("aten::log", "aten::pow", Operand("self", _FACTS, (-2.0,))),
    _case("aten::mul", "aten::pow", _RESULT, Operand("other", None, (math.nan,))),
)
CLEAN = (
    _case("aten::log", "aten::pow", Operand("self", _FACTS, (0.0,))),
    _case("aten::log", "aten::special_entr", Operand("self", _FACTS, (-2.0,))),
    _case("aten::mul", "aten::pow", _RESULT, Operand("other", _FACTS, (math.nan,))),
    _case("aten::mul", "aten::pow", _RESULT, Operand("other", None, (0.7,))),
)
