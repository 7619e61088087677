"""inverse-trigonometric-gradient-at-edge: the gradient of acos, asin, acosh or atanh was taken where it is infinite.

What it does:
    Looks at what the backward pass takes the root of or divides by: 1 - x * x, or x * x - 1 for
    ``acosh``. The rule holds only if it is 0 at the
    offending elements, so that x is 1 or -1 to the last bit.

Why it matters:
    A cosine of two equal vectors is exactly 1, a saturated ``tanh`` exactly -1 or 1; there the slope of these functions
    is infinite. A clamp to [-1, 1] keeps the forward pass out of trouble and the backward pass in it.

Example:
    ``torch.ones(1, requires_grad=True).acos().backward()``

Use instead:
    For an angle between vectors, ``torch.atan2`` of the sine and the cosine, or an argument clamped to a little less
    than 1, by more than half the spacing of the numbers there. For ``acosh``, whose argument is at least 1, a clamp to
    a little more. In place of ``atanh`` of a ``tanh``, what went into the ``tanh``.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import all_equal, of_torch, zero_notes
from nanhunt.rules.registry import Case, Judgement, Rule

# The operation of the backward pass, and the name of its argument that is 0 at the edge.
_POLES = {"acos": ("rsqrt", "self"), "asin": ("rsqrt", "self"), "acosh": ("rsqrt", "self"), "atanh": ("div", "other")}

_BELOW = "clamp the argument to a little less than 1 in magnitude before the function"
_HELP = {
    "acos": f"take the angle from atan2, or {_BELOW}",
    "asin": f"take the angle from atan2, or {_BELOW}",
    "acosh": "clamp the argument to a little more than 1 before the function",
    "atanh": f"{_BELOW}, or keep what went into the tanh that it undoes",
}


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function not in _POLES:
        return None
    name, argument = _POLES[found.function]
    if found.name != name or not all_equal(found.held.at(argument), 0.0):
        return None
    assert case.evidence is not None
    number, where, arguments = case.evidence.num_offending, list(found.held.positions[0]), found.held.held("self")
    evidence: dict[str, object] = {"num_offending": number, "first_position": where}
    if arguments:
        evidence["argument"] = arguments[0]
    at = f"{arguments[0]:.9g}" if arguments else "the end of its domain"
    return Judgement(
        f"gradient of {found.function} at {at} for {count(number, 'element')}, first at {where}",
        evidence=evidence,
        notes=zero_notes(case),
        help=(_HELP[found.function],),
    )


RULE = Rule("NH210", "inverse-trigonometric-gradient-at-edge", "inverse-trigonometric-gradient-at-edge", _judge)


def _at(edge: float, argument: float) -> Case:
    op = OpRecord(
        *(9, "aten::rsqrt", "birth", "backward", "", None),
        forward_op="aten::acos",
        outputs=(ValueFacts((2,), "float32", num_posinf=1),),
    )
    inputs = (Operand("self", None, (edge,)),)
    held = BackwardEvidence(((0,),), (float("inf"),), inputs, (Operand("self", None, (argument,)),))
    return Case(op, OffenderEvidence(1, ((0,),), (float("inf"),), inputs, backward=held))


FLAGGED = (_at(0.0, 1.0), _at(0.0, -1.0))
CLEAN = (_at(-3.0, 2.0), Case(OpRecord(3, "aten::acos", "birth", "forward", "", None)))
