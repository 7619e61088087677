"""eigenvector-gradient-at-tie: the gradient of eigenvectors was taken where two eigenvalues are exactly equal.

What it does:
    Looks at the spectrum of the matrix at which the backward pass of ``eigh``, ``svd`` or ``eig`` went non-finite. The
    rule holds only if two of its values are equal bit for bit.

Why it matters:
    The derivative of an eigenvector holds 1 / (value_i - value_j). At a tie the eigenvectors are not even defined, only
    the space they span, and the division gives infinity or NaN. The forward pass is finite throughout.

Example:
    ``torch.linalg.eigh(torch.eye(3, requires_grad=True)).eigenvectors.sum().backward()``

Use instead:
    Detach the eigenvectors where they are only a description of the graph; or a function of the matrix that is smooth
    at ties, such as a heat kernel or random-walk probabilities.

Known limits:
    Near-ties give huge but finite gradients (about 1 / gap) and are not this rule's.

References:
    Magnus 1985, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1(2).
"""

from dataclasses import replace

from nanhunt.records.evidence import BackwardEvidence, OffenderEvidence, Spectrum
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_SPECTRAL = ("aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_eig")


def _judge(case: Case) -> Judgement | None:
    spectrum = case.evidence.spectrum if case.evidence else None
    if case.op is None or case.op.phase != "backward" or case.op.forward_op not in _SPECTRAL:
        return None
    if case.op.forward_op == "aten::linalg_eig":
        return _of_complex(case)
    if spectrum is None or not spectrum.tied:
        return None
    group = spectrum.tied[0]
    value = spectrum.values[group[0]]
    noun = "singular value" if case.op.forward_op == "aten::_linalg_svd" else "eigenvalue"
    rows = ", ".join(str(row) for row in sorted(spectrum.rows[:6]))
    more = f" and {len(spectrum.rows) - 6} more" if len(spectrum.rows) > 6 else ""
    where = f"matrix {spectrum.matrix_index:,} of {spectrum.num_matrices:,}"
    return Judgement(
        f"{noun} gap 0 at {where}" + (f", rows {rows}{more} tied" if rows else ""),
        evidence={
            "matrix_position": list(spectrum.matrix_position),
            "tied_positions": list(group),
            noun.replace(" ", "_"): value,
            "rows_tied": sorted(spectrum.rows),
            "spacing_of_floats_there": spectrum.eps,
            "num_tied_matrices": spectrum.num_tied,
            "num_matrices": spectrum.num_matrices,
            "median_min_gap": spectrum.median_min_gap,
        },
        notes=(
            f"{noun}s {' and '.join(str(position) for position in group)} of that matrix are equal to the last bit"
            + ("; their vectors live on the rows named" if rows else ""),
            f"the backward pass divides by the gap between {noun}s; the forward pass is finite",
        ),
        help=(
            "detach the vectors, if the model only needs them as features",
            f"adding eps to the diagonal moves all {noun}s alike: the gap stays what it is",
        ),
    )


def _of_complex(case: Case) -> Judgement | None:
    """The eigenvalues of a matrix that is not symmetric have no order, only distances."""
    held = case.evidence.backward if case.evidence else None
    if held is None or held.smallest != 0.0:
        return None
    where = list(held.positions[0])
    return Judgement(
        f"two eigenvalues are equal, first at {where}",
        evidence={"first_position": where, "smallest_distance": 0.0, "largest_eigenvalue": held.largest},
        notes=("the backward pass divides by the distance between eigenvalues; the forward pass is finite",),
        help=("detach the eigenvectors, if the model only needs them as features",),
    )


RULE = Rule("NH203", "eigenvector-gradient-at-tie", "eigenvector-gradient-at-tied-spectrum", _judge)

_DIV = OpRecord(
    *(67, "aten::div_", "birth", "backward", "pe", None),
    forward_index=22,
    forward_op="aten::_linalg_eigh",
    outputs=(ValueFacts((2, 3, 3), "float32", num_nan=2),),
)


def _with_values(values: tuple[float, ...], tied: tuple[tuple[int, ...], ...]) -> Case:
    rows = (0, 2) if tied else ()
    spectrum = Spectrum(1, (1,), 2, len(tied), values, tied, 0.0 if tied else 1e-6, 0.01, rows, 1.2e-7)
    return Case(_DIV, OffenderEvidence(2, ((1, 0, 1), (1, 1, 0)), (float("nan"),) * 2, spectrum=spectrum))


def _with_distance(distance: float) -> Case:
    held = BackwardEvidence(((0, 1),), (float("nan"),), smallest=distance, largest=1.0)
    evidence = OffenderEvidence(2, ((0, 1),), (float("nan"),), backward=held)
    return Case(replace(_DIV, forward_op="aten::linalg_eig"), evidence)


FLAGGED = (
    _with_values((0.0, 1.0, 1.0), ((1, 2),)),
    _with_values((1.0, 1.0, 1.0), ((0, 1, 2),)),
    _with_distance(0.0),
)
CLEAN = (_with_values((0.0, 1.0, 1.000001), ()), Case(_DIV, None), _with_distance(1e-9))
