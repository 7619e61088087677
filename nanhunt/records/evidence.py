"""What the inputs of the first offender held at the elements where it went wrong."""

from dataclasses import dataclass

from nanhunt.records.ops import ValueFacts


@dataclass(frozen=True)
class Operand:
    """One input of the offender.

    Attributes:
        name: Argument name of the operation's schema.
        facts: Counts over the whole tensor; None for a plain number.
        at_offenders: Its values at the offending elements, where its shape broadcasts to the output's; else empty.
    """

    name: str
    facts: ValueFacts | None
    at_offenders: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spectrum:
    """The eigen- or singular values of the matrix whose gradient went non-finite.

    Attributes:
        matrix_index: Position of the matrix in the batch of matrices, flattened.
        matrix_position: The same as an index into the batch's own dimensions, sample first.
        num_matrices: Matrices in the batch.
        num_tied: Matrices of the batch with two exactly equal values.
        values: All values of this matrix.
        tied: Groups of positions whose values are exactly equal.
        min_gap: Smallest difference of neighbouring values in this matrix.
        median_min_gap: Median over the batch of each matrix's smallest gap.
        rows: Rows (nodes) that carry the tied vectors: those holding more than their share of the squared weight.
        eps: Spacing of floating-point numbers at the tied value.
    """

    matrix_index: int
    matrix_position: tuple[int, ...]
    num_matrices: int
    num_tied: int
    values: tuple[float, ...]
    tied: tuple[tuple[int, ...], ...]
    min_gap: float
    median_min_gap: float
    rows: tuple[int, ...]
    eps: float


@dataclass(frozen=True)
class BackwardEvidence:
    """What the forward operation held where its backward pass went wrong.

    Attributes:
        operands: Inputs of the forward operation, at the offending elements.
        results: Its output there.
        gradients: The gradient that came in there.
    """

    operands: tuple[Operand, ...] = ()
    results: tuple[float, ...] = ()
    gradients: tuple[float, ...] = ()


@dataclass(frozen=True)
class OffenderEvidence:
    """What a rule needs in order to name a cause.

    Attributes:
        num_offending: Non-finite elements of the first non-finite output.
        positions: Indices of the first few of them.
        results: What they became: NaN, inf or -inf.
        operands: The inputs.
        spectrum: Where the forward operation is a spectral decomposition.
        rows_all_neginf: Rows that were -inf throughout, for an operation along one dimension such as softmax.
        backward: For a backward operation, what its forward operation held.
    """

    num_offending: int
    positions: tuple[tuple[int, ...], ...]
    results: tuple[float, ...]
    operands: tuple[Operand, ...] = ()
    spectrum: Spectrum | None = None
    rows_all_neginf: int | None = None
    backward: BackwardEvidence | None = None
