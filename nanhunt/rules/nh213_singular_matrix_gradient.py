"""singular-matrix-gradient: the gradient of an inverse, a solution or a factor of a singular matrix was taken.

What it does:
    Looks at the matrix of the offending elements: the singular values of what ``inv`` inverted, the diagonal of the
    factor of ``qr``, ``solve``, ``lu_factor`` and ``cholesky``. The rule holds if the smallest is 0, or so small that
    one over its square is beyond the type: 5.4e-20 in float32.

Why it matters:
    The backward pass of ``inv`` multiplies with the inverse twice; that of ``qr`` solves with R, which is singular
    where a column depends on those before it. The forward pass is large but finite, or fine; the gradient overflows.

Example:
    ``torch.linalg.qr(torch.zeros(3, 2, requires_grad=True)).Q.sum().backward()``

Use instead:
    ``torch.linalg.lstsq`` or ``pinv`` for matrices that may lose rank; a ridge ``A + eps * I`` that is large against
    the type's precision times the largest singular value.

Known limits:
    The diagonal of a factor only bounds the singular values: a matrix may be singular without a small entry there.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.nh208_untaken_branch_gradient import of_torch
from nanhunt.rules.registry import Case, Judgement, Rule

_WHAT = {
    "linalg_inv_ex": "singular value of the matrix",
    "_linalg_solve_ex": "pivot of the matrix",
    "linalg_lu_factor_ex": "pivot of the matrix",
    "linalg_cholesky_ex": "entry on the diagonal of L",
    "linalg_qr": "entry on the diagonal of R",
}


def _judge(case: Case) -> Judgement | None:
    found = of_torch(case)
    if found is None or found.function not in _WHAT or not found.op.outputs:
        return None
    smallest, largest, dtype = found.held.smallest, found.held.largest, found.op.outputs[0].dtype
    if smallest is None or dtype not in LIMITS or not _is_singular(smallest, dtype):
        return None
    assert case.evidence is not None
    where = list(found.held.positions[0])
    evidence = {
        "num_offending": case.evidence.num_offending,
        "first_position": where,
        "smallest": smallest,
        **({"largest": largest} if largest is not None else {}),
        **({"position_of_smallest": found.held.smallest_at} if found.held.smallest_at is not None else {}),
    }
    place = f" (column {found.held.smallest_at})" if found.held.smallest_at is not None else ""
    against = f", the largest {largest:.6g}" if largest is not None else ""
    return Judgement(
        f"gradient of {found.function.strip('_').removesuffix('_ex')}: the smallest {_WHAT[found.function]} is "
        f"{smallest:.6g}{place}{against}, first at {where}",
        evidence=evidence,
        help=("add a ridge to the matrix, or use lstsq or pinv, which are meant for matrices that lose rank",),
    )


def _is_singular(smallest: float, dtype: str) -> bool:
    """Whether one over the square, which the backward pass multiplies with, is beyond the type."""
    return smallest**2 < 1 / LIMITS[dtype].max


RULE = Rule("NH213", "singular-matrix-gradient", "singular-matrix-gradient", _judge)


def _with_values(smallest: float | None, largest: float, of: str = "aten::linalg_inv_ex") -> Case:
    record = OpRecord(
        *(9, "aten::mm", "birth", "backward", "", None),
        forward_op=of,
        outputs=(ValueFacts((2, 2), "float32", num_posinf=1),),
    )
    held = BackwardEvidence(((0, 0),), (float("inf"),), smallest=smallest, largest=largest)
    return Case(record, OffenderEvidence(1, ((0, 0),), (float("inf"),), backward=held))


FLAGGED = (_with_values(1e-25, 1.0), _with_values(1e-25, 1e-25), _with_values(0.0, 1.0, "aten::linalg_qr"))
CLEAN = (_with_values(0.1, 1.0), _with_values(1e-9, 1.0), _with_values(None, 1.0), _with_values(1e-25, 1.0, "aten::mm"))
