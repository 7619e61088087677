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
        made_by: The operations that made it, the last one first, as far as autograd remembers them.
    """

    name: str
    facts: ValueFacts | None
    at_offenders: tuple[float, ...] = ()
    made_by: tuple["Producer", ...] = ()


@dataclass(frozen=True)
class Producer:
    """One of the operations that made an operand.

    Attributes:
        op: Its name, such as ``clamp``.
        dtype: Element type of its result.
        numbers: Plain numbers it was given: name, value, and the value in the type of the result.
        of: Names of the operations that its inputs with a gradient were made by; a leaf is ''.
        lost: Its exact value at the first offending element, where it is not 0 and the result is.
    """

    op: str
    dtype: str
    numbers: tuple[tuple[str, float, float], ...] = ()
    of: tuple[str, ...] = ()
    lost: float | None = None


@dataclass(frozen=True)
class Exact:
    """What an operation gives at one offending element in float64.

    Attributes:
        value: The result; the magnitude of a complex one.
        largest: The sum of the magnitudes of all terms, which a partial sum may come to; 0 where it is not a sum.
        num_zero_times_infinity: Terms of a sum of products that are 0 times infinity.
        num_infinite: Terms that are infinite.
    """

    value: float
    largest: float = 0.0
    num_zero_times_infinity: int = 0
    num_infinite: int = 0


@dataclass(frozen=True)
class Singular:
    """Matrices without an inverse among those that an operation was to invert or to solve with.

    Attributes:
        num_singular: How many.
        num_matrices: How many there are.
        position: Index of the first of them into the batch; empty where there is one matrix.
        zero_at: Place on the diagonal that is exactly 0; None where that is not known.
        is_triangular: Whether the matrix is read as a triangle, so that its diagonal decides.
    """

    num_singular: int
    num_matrices: int
    position: tuple[int, ...] = ()
    zero_at: int | None = None
    is_triangular: bool = False


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
    """What a backward operation and the forward operation it belongs to held where it went wrong.

    Attributes:
        positions: Indices of the first few offending elements: the NaN, where there is NaN among infinities.
        made: What they became.
        inputs: Inputs of the backward operation there.
        operands: Inputs and results of the forward operation there, as far as autograd kept them.
        cut_by: The operation that read the forward result and left elements out, such as ``where``; '' where some of
            its readers may have taken all, or where that is not known.
        is_in_hook: Whether a gradient hook ran it.
        smallest: What the backward pass of a matrix operation divides by, at its smallest: a singular value, an entry
            of the diagonal of a factor, the distance of two eigenvalues.
        largest: The largest singular value, diagonal entry or eigenvalue.
        smallest_at: Position of the smallest one.
    """

    positions: tuple[tuple[int, ...], ...] = ()
    made: tuple[float, ...] = ()
    inputs: tuple[Operand, ...] = ()
    operands: tuple[Operand, ...] = ()
    cut_by: str = ""
    is_in_hook: bool = False
    smallest: float | None = None
    largest: float | None = None
    smallest_at: int | None = None

    def at(self, name: str) -> tuple[float, ...]:
        """Values of an input of the backward operation at the positions; empty where there are none."""
        return next((operand.at_offenders for operand in self.inputs if operand.name == name), ())

    def held(self, name: str) -> tuple[float, ...]:
        """Values of an input or result of the forward operation there; empty where there are none."""
        return next((operand.at_offenders for operand in self.operands if operand.name == name), ())


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
        exact: What the same operation gives in float64 at those elements; empty where that cannot be told.
        singular: Matrices without an inverse, for an operation that needs one.
        lengths: Lists of whole numbers it was given, such as the lengths of sequences, by name.
    """

    num_offending: int
    positions: tuple[tuple[int, ...], ...]
    results: tuple[float, ...]
    operands: tuple[Operand, ...] = ()
    spectrum: Spectrum | None = None
    rows_all_neginf: int | None = None
    backward: BackwardEvidence | None = None
    exact: tuple[Exact, ...] = ()
    singular: Singular | None = None
    lengths: tuple[tuple[str, tuple[int, ...]], ...] = ()
