"""fully-masked-logsumexp-gradient: the gradient of a logsumexp was taken over a row that is -inf throughout.

What it does:
    Looks at the difference between the input and the result in the backward pass of ``logsumexp``, ``logaddexp`` and
    ``logcumsumexp``. The rule holds only if both are -inf where the difference is NaN.

Why it matters:
    The forward pass gives -inf, which is right: log(0), a path that cannot be taken. The backward pass subtracts -inf
    from -inf; the NaN reaches every parameter that the row was computed from. This is how alpha recursions (CTC, CRF,
    hidden Markov models) with forbidden transitions fail.

Example:
    a forward algorithm whose first state has no allowed predecessor

Use instead:
    A large finite number such as -1e4 in place of -inf, or rows that are masked out before the ``logsumexp``.

References:
    pytorch#31829, pytorch#49724.
"""

import math

from nanhunt.numerics import count
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import all_equal, of_torch
from nanhunt.rules.registry import Case, Judgement, Rule

_FUNCTIONS = ("logsumexp", "logaddexp", "logaddexp2", "logcumsumexp", "_logcumsumexp")


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function not in _FUNCTIONS or found.name != "sub" or not found.op.outputs:
        return None
    if not all(all_equal(found.held.at(name), -math.inf) for name in ("self", "other")):
        return None
    number, where = found.op.outputs[0].num_nan, list(found.held.positions[0])
    return Judgement(
        f"gradient of {found.function} over -inf alone for {count(number, 'element')}, first at {where}",
        evidence={"num_offending": number, "first_position": where},
        notes=("-inf minus -inf; the forward pass gives -inf there, which is right",),
        help=("mask with a large finite number such as -1e4, or leave rows without any other entry out",),
    )


RULE = Rule(
    "NH217", "fully-masked-logsumexp-gradient", "fully-masked-logsumexp-gradient", _judge, goes_before=("NH105",)
)

_SUB = OpRecord(
    *(9, "aten::sub", "birth", "backward", "", None),
    forward_op="aten::logsumexp",
    outputs=(ValueFacts((4,), "float32", num_nan=2, num_neginf=1),),
)


def _subtracted(value: float, result: float) -> Case:
    inputs = (Operand("self", None, (value,)), Operand("other", None, (result,)))
    held = BackwardEvidence(((0,),), (float("nan"),), inputs)
    return Case(_SUB, OffenderEvidence(3, ((0,),), (float("nan"),), inputs, backward=held))


FLAGGED = (_subtracted(-math.inf, -math.inf),)
CLEAN = (_subtracted(math.inf, math.inf), _subtracted(-math.inf, 1.0), Case(_SUB, None))
