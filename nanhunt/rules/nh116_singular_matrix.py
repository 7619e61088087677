"""singular-matrix: a matrix without an inverse was inverted, solved with, or its log-determinant taken.

What it does:
    Reads what the operation says itself: its error codes, the sign of its determinant, an exact zero on the diagonal
    of the triangle it was given. The rule holds where one of them tells that a matrix is singular.

Why it matters:
    Functions that end in ``_ex``, ``slogdet`` and the triangular solvers do not raise: they return infinities or NaN.

Example:
    ``torch.linalg.slogdet(torch.zeros(3, 3)).logabsdet``

Use instead:
    ``lstsq`` or ``pinv`` where a singular matrix is to be expected; a multiple of the identity added where rounding or
    too few samples made it singular.

Known limits:
    A matrix that is almost singular gives huge finite numbers and is not this rule's. Where torch raises, it is
    ``refused-matrix``.
"""

from nanhunt.numerics import count
from nanhunt.records.evidence import OffenderEvidence, Singular
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import has_infinite_input, has_nan_input, is_written_by_user, numbers
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = case.evidence.singular if case.evidence is not None else None
    if found is None or not is_written_by_user(case) or has_nan_input(case) or has_infinite_input(case):
        return None
    assert case.op is not None
    first = f", first at {list(found.position)} of the batch" if found.position else ""
    verb = "is" if found.num_singular == 1 else "are"
    which = f"{found.num_singular:,} of {count(found.num_matrices, 'matrix', 'matrices')} {verb} singular{first}"
    what = "an exact 0 on the diagonal" if found.is_triangular else "a pivot of exactly 0"
    at = f", at {found.zero_at}" if found.zero_at is not None else ""
    return Judgement(
        f"{case.op.op}: {which}",
        evidence=numbers(
            case, num_singular=found.num_singular, num_matrices=found.num_matrices, position=list(found.position)
        ),
        notes=(f"it holds {what}{at}",),
        help=("look at how the matrix is made: a row of zeros, rows that are equal, a covariance of too few samples",),
    )


RULE = Rule("NH116", "singular-matrix", "singular-matrix", _judge)

_SLOGDET = OpRecord(
    *(5, "aten::_linalg_slogdet", "birth", "forward", "flow", None),
    outputs=(ValueFacts((2,), "float32", num_neginf=1),),
)


def _with(found: Singular | None) -> Case:
    return Case(_SLOGDET, OffenderEvidence(1, ((1,),), (float("-inf"),), singular=found))


FLAGGED = (_with(Singular(1, 2, (1,))), _with(Singular(1, 1, (), 0, is_triangular=True)))
CLEAN = (_with(None), Case(_SLOGDET))
