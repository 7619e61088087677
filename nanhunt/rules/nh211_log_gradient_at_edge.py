"""log-gradient-at-edge: the gradient of a logarithm was taken where its argument is zero.

What it does:
    Looks at what the backward pass of ``log``, ``log2``, ``log10``, ``log1p``, ``logit``, ``xlogy`` and ``entr``
    divides by or takes the logarithm of. The rule holds only if it is 0 (for ``logit``, 0 or 1) at the offending
    elements.

Why it matters:
    The slope is 1 / 0. The forward pass may be finite all the same: ``xlogy(0, 0)`` and ``entr(0)`` are 0, and the
    infinity of a ``log`` may be dropped by a mask or bounded by a clamp.

Example:
    ``torch.special.entr(torch.zeros(2, requires_grad=True)).sum().backward()``

Use instead:
    ``log_softmax``, ``logsigmoid`` or ``softplus`` on the logits, whose gradients are bounded; or a small constant
    added to the argument.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import OfTorch, all_equal, of_torch, zero_notes
from nanhunt.rules.registry import Case, Judgement, Rule

_QUOTIENTS = ("log", "log2", "log10", "log1p", "xlogy", "special_xlog1py")


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or not _is_at_edge(found):
        return None
    assert case.evidence is not None
    number, where = case.evidence.num_offending, list(found.held.positions[0])
    name = "other" if found.function in ("xlogy", "special_xlog1py") else "self"
    argument = next(iter(found.held.held(name)), -1.0 if found.function == "log1p" else 0.0)
    return Judgement(
        f"gradient of {found.function} at {argument:.6g} for {count(number, 'element')}, first at {where}",
        evidence={"num_offending": number, "first_position": where, "argument": argument},
        notes=zero_notes(case),
        help=("work on the logits: log_softmax, logsigmoid and softplus have bounded gradients",),
    )


def _is_at_edge(found: OfTorch) -> bool:
    if found.function in _QUOTIENTS:
        return found.name == "div" and all_equal(found.held.at("other"), 0.0)
    if found.function == "special_entr":
        return found.name == "log" and all_equal(found.held.at("self"), 0.0)
    arguments = found.held.at("self")
    is_logit = found.function == "logit" and found.name == "logit_backward"
    return is_logit and bool(arguments) and all(value in (0.0, 1.0) for value in arguments)


RULE = Rule("NH211", "log-gradient-at-edge", "log-gradient-at-edge", _judge)


def _divided_by(value: float, of: str = "aten::log") -> Case:
    op = OpRecord(
        *(9, "aten::div", "birth", "backward", "", None),
        forward_op=of,
        outputs=(ValueFacts((2,), "float32", num_posinf=1),),
    )
    inputs = (Operand("self", None, (1.0,)), Operand("other", None, (value,)))
    held = BackwardEvidence(((0,),), (float("inf"),), inputs, (Operand("self", None, (value,)),))
    return Case(op, OffenderEvidence(1, ((0,),), (float("inf"),), inputs, backward=held))


FLAGGED = (_divided_by(0.0), _divided_by(0.0, "aten::log_"))
CLEAN = (_divided_by(1e-40), _divided_by(0.0, "aten::sqrt"))
