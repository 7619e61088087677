"""singular-vector-gradient-at-zero: the gradient of singular vectors was taken of a matrix that has lost rank.

What it does:
    Looks at the singular values of the matrix at which the backward pass of ``svd`` went non-finite. The rule holds
    only if one of them is exactly 0, no two are equal, and the operation divided by it.

Why it matters:
    The backward pass of a tall or wide matrix divides by the singular values themselves, for the part of U or V outside
    the column space; with rank lost, that is a division by 0. The forward pass is fine.

Example:
    ``torch.linalg.svd(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True), full_matrices=False)``

Use instead:
    Detach U and V where they only describe the data; use singular values alone, whose gradient is finite; or
    ``torch.linalg.lstsq`` and ``pinv`` for what they were wanted for.
"""

from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import all_equal, of_torch
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function != "_linalg_svd" or found.name != "div" or found.held.smallest != 0:
        return None
    if not all_equal(found.held.at("other"), 0.0):
        return None
    assert case.evidence is not None
    where, rank = list(found.held.positions[0]), found.held.smallest_at
    return Judgement(
        f"gradient of singular vectors where singular value {rank} is 0, first at {where}",
        evidence={"num_offending": case.evidence.num_offending, "first_position": where, "singular_value": 0.0},
        notes=("the backward pass of svd divides by the singular values where the matrix is not square",),
        help=("detach U and V, or use the singular values alone",),
    )


RULE = Rule("NH214", "singular-vector-gradient-at-zero", "singular-vector-gradient-at-zero", _judge)

_DIV = OpRecord(
    *(9, "aten::div", "birth", "backward", "", None),
    forward_op="aten::_linalg_svd",
    outputs=(ValueFacts((3, 2), "float32", num_posinf=3),),
)


def _with_value(value: float) -> Case:
    inputs = (Operand("self", None, (1.0,)), Operand("other", None, (value,)))
    held = BackwardEvidence(((0, 1),), (float("inf"),), inputs, smallest=value, largest=1.0, smallest_at=1)
    return Case(_DIV, OffenderEvidence(3, ((0, 1),), (float("inf"),), inputs, backward=held))


FLAGGED = (_with_value(0.0),)
CLEAN = (_with_value(1e-40), Case(_DIV, None))
