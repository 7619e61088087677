"""fully-masked-softmax: softmax of a row that is -inf throughout.

What it does:
    Holds where a softmax made NaN and its input has rows that are -inf from end to end.

Why it matters:
    A partly masked row is fine: exp(-inf) is 0. In a row without any other value, softmax subtracts -inf from -inf.

Use instead:
    Leave padding rows out, or give each row at least one unmasked entry and drop the result afterwards.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    rows = case.evidence.rows_all_neginf if case.evidence else None
    if case.op is None or not rows:
        return None
    assert case.evidence is not None
    where = list(case.evidence.positions[0])
    return Judgement(
        f"{case.op.op} over {count(rows, 'row')} that {'is' if rows == 1 else 'are'} -inf throughout, first at {where}",
        evidence={"num_rows": rows, "first_position": where},
        help=("give each row at least one unmasked entry, or leave fully masked rows out",),
    )


RULE = Rule("NH105", "fully-masked-softmax", "fully-masked-softmax-row", _judge)

_SOFTMAX = OpRecord(
    5, "aten::_softmax", "birth", "forward", "attention", None, outputs=(ValueFacts((2, 2), "float32", num_nan=2),)
)
FLAGGED = (Case(_SOFTMAX, OffenderEvidence(2, ((1, 0), (1, 1)), (float("nan"),) * 2, rows_all_neginf=1)),)
CLEAN = (Case(_SOFTMAX, OffenderEvidence(2, ((1, 0), (1, 1)), (float("nan"),) * 2, rows_all_neginf=0)),)
