"""refused-matrix: a decomposition ended the step over a finite matrix: singular, or not positive-definite.

What it does:
    Holds where ``torch.linalg`` raised over error codes of its own, and every value it was given is finite.

Why it matters:
    One matrix of a batch is enough to end the whole step, and the message does not say whose it was.

Example:
    ``torch.linalg.inv(torch.zeros(2, 3, 3))``

Use instead:
    ``torch.linalg.lstsq`` or ``pinv`` where a singular matrix is to be expected; a Cholesky factor of the matrix plus a
    multiple of the identity where rounding alone made it indefinite.

Known limits:
    A matrix that is almost singular passes and gives huge finite numbers.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.outputs or case.evidence is None:
        return None
    positions = [list(position) for position in case.evidence.positions]
    which = f", first at {positions[0]} of the batch" if positions else ""
    return Judgement(
        f"{case.op.op} refused {count(case.evidence.num_offending, 'finite matrix', 'finite matrices')}{which}",
        evidence={"num_refused": case.evidence.num_offending, **({"positions": positions} if positions else {})},
        help=("look at how the matrix is made: rows that are equal, a covariance of too few samples",),
    )


RULE = Rule("NH106", "refused-matrix", "refused-matrix", _judge)

_INVERSE = OpRecord(5, "aten::linalg_inv", "birth", "forward", "whitening", None)
_LOG = OpRecord(5, "aten::log", "birth", "forward", "loss", None, outputs=(ValueFacts((2,), "float32", num_neginf=1),))
FLAGGED = (Case(_INVERSE, OffenderEvidence(1, ((3,),), ())),)
CLEAN = (Case(_LOG, OffenderEvidence(1, ((1,),), (float("-inf"),))),)
