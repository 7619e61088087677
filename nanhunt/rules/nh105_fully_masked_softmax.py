"""fully-masked-softmax: softmax of a row that is -inf throughout.

What it does:
    Holds where a softmax, alone or in a fused attention, made NaN and its input or mask has rows that are -inf from end
    to end and none with +inf; and where such a row's largest value was subtracted from it by hand.

Why it matters:
    A partly masked row is fine: exp(-inf) is 0. In a row without any other value, softmax subtracts -inf from -inf.

Use instead:
    Leave padding rows out, or give each row at least one unmasked entry and drop the result afterwards.
"""

import math

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    rows = case.evidence.rows_all_neginf if case.evidence else None
    if case.op is None or not rows or not case.op.outputs or not case.op.outputs[0].num_nan:
        return None
    given = case.operand("self")
    if given is not None and given.facts is not None and given.facts.num_posinf:
        return None
    assert case.evidence is not None
    pairs = zip(case.evidence.positions, case.evidence.results, strict=True)
    where = next((list(position) for position, result in pairs if math.isnan(result)), [])
    first = f", first at {where}" if where else ""
    return Judgement(
        f"{case.op.op} over {count(rows, 'row')} that {'is' if rows == 1 else 'are'} -inf throughout{first}",
        evidence={"num_rows": rows, "first_position": where},
        help=("give each row at least one unmasked entry, or leave fully masked rows out",),
    )


RULE = Rule("NH105", "fully-masked-softmax", "fully-masked-softmax-row", _judge)

_SOFTMAX = OpRecord(
    5, "aten::_softmax", "birth", "forward", "attention", None, outputs=(ValueFacts((2, 2), "float32", num_nan=2),)
)
FLAGGED = (Case(_SOFTMAX, OffenderEvidence(2, ((1, 0), (1, 1)), (float("nan"),) * 2, rows_all_neginf=1)),)
_INFINITE = (Operand("self", ValueFacts((2, 2), "float32", num_posinf=1, num_neginf=2)),)
CLEAN = (
    Case(_SOFTMAX, OffenderEvidence(2, ((1, 0), (1, 1)), (float("nan"),) * 2, rows_all_neginf=0)),
    Case(_SOFTMAX, OffenderEvidence(2, ((1, 0), (1, 1)), (float("nan"),) * 2, _INFINITE, rows_all_neginf=1)),
)
