"""Records of the dtype audit: where types change in one step, and what that costs against float64."""

from dataclasses import dataclass
from typing import Literal

from nanhunt.records.ops import Phase, SourceLine

BEYOND = 4
"""An element is far from float64 where its relative error is above this many eps of its type; rounding gives a half."""


@dataclass(frozen=True)
class OpPlace:
    """Where one kind of operation runs.

    Attributes:
        op: Name such as ``aten::add``.
        phase: Part of the step.
        module: Dotted path; empty outside modules.
        source: The user's line; for a backward operation that of its forward.
        forward_op: For a backward operation, the forward operation it differentiates.
    """

    op: str
    phase: Phase = "forward"
    module: str = ""
    source: SourceLine | None = None
    forward_op: str = ""


@dataclass(frozen=True)
class ShadowError:
    """How far results lie from those of the same operation on float64 copies of the same inputs.

    Attributes:
        num_elements: Results that were compared.
        max_relative: Largest relative error of an element.
        median_relative: Median of the same.
        norm_relative: Norm of the error over that of the result; for a sum, over that of the sum of magnitudes.
        num_beyond: Elements further than ``BEYOND`` eps from float64, without subnormal ones.
        num_to_zero: Zeros where the float64 result would not round to zero.
        num_overflow: Infinite where float64 is finite.
        num_negative_overflow: Those of them that are -inf.
        num_nan: NaN where float64 is finite.
        largest: Largest finite magnitude of the float64 results.
    """

    num_elements: int
    max_relative: float = 0.0
    median_relative: float = 0.0
    norm_relative: float = 0.0
    num_beyond: int = 0
    num_to_zero: int = 0
    num_overflow: int = 0
    num_negative_overflow: int = 0
    num_nan: int = 0
    largest: float = 0.0

    def joined(self, other: "ShadowError") -> "ShadowError":
        """Both together: counts are added, of errors the larger is kept."""
        return ShadowError(
            num_elements=self.num_elements + other.num_elements,
            max_relative=max(self.max_relative, other.max_relative),
            median_relative=max(self.median_relative, other.median_relative),
            norm_relative=max(self.norm_relative, other.norm_relative),
            num_beyond=self.num_beyond + other.num_beyond,
            num_to_zero=self.num_to_zero + other.num_to_zero,
            num_overflow=self.num_overflow + other.num_overflow,
            num_negative_overflow=self.num_negative_overflow + other.num_negative_overflow,
            num_nan=self.num_nan + other.num_nan,
            largest=max(self.largest, other.largest),
        )


@dataclass(frozen=True)
class ZeroDim:
    """A 0-dim tensor of a wider type, which does not widen the result.

    Attributes:
        dtype: Its type.
        value: Its value.
        rounded: That value in the type of the result.
    """

    dtype: str
    value: float
    rounded: float


@dataclass(frozen=True)
class OpUse:
    """One operation with one combination of types at one place.

    Attributes:
        place: Where.
        inputs: Types of its floating tensors; a 0-dim one ends with ``()``.
        output: Type of its first floating result.
        count: How often it ran.
        error: Against float64; None where nothing was compared.
        num_terms: Elements that went into one result of a reduction; 0 for what reduces nothing.
        zero_dim: The worst 0-dim tensor of a wider type among its inputs.
        num_inherited: Runs in a region with autocast switched off on what autocast had made in half outside it.
    """

    place: OpPlace
    inputs: tuple[str, ...]
    output: str
    count: int = 1
    error: ShadowError | None = None
    num_terms: int = 0
    zero_dim: ZeroDim | None = None
    num_inherited: int = 0


@dataclass(frozen=True)
class Narrowing:
    """A conversion to a type with less range or precision.

    Attributes:
        place: Where.
        source: Type before.
        target: Type after.
        tensor: Name of the batch tensor it converts; empty for others.
        num_elements: Elements converted.
        num_overflow: Finite before and beyond the range of the type: infinite after, or NaN, or its largest number.
        is_mask: Whether they are all one negative number, as in a mask.
        largest: Largest finite magnitude before.
        num_nonzero: Elements that were not zero.
        num_to_zero: Those of them that are zero after.
        num_samples: Samples along the first dimension that are not all zero.
        num_samples_lost: Samples of which underflow took more than a hundredth, by norm.
        lost: Share of the whole that underflow took, by norm.
        spread_error: Norm of the rounding error over that of the deviations from the mean; 0 for a constant.
    """

    place: OpPlace
    source: str
    target: str
    tensor: str = ""
    num_elements: int = 1
    num_overflow: int = 0
    is_mask: bool = False
    largest: float = 0.0
    num_nonzero: int = 0
    num_to_zero: int = 0
    num_samples: int = 0
    num_samples_lost: int = 0
    lost: float = 0.0
    spread_error: float = 0.0


@dataclass(frozen=True)
class VanishedConstant:
    """A plain number or 0-dim tensor that has no effect in the type of the result.

    Attributes:
        place: Where.
        dtype: Type of the result.
        kind: ``addend``: adding it changed no element. ``lower bound``, ``upper bound``: of a clamp, it rounds to what
            it is to keep out. ``filling``: the tensor is filled with zeros instead.
        value: The constant.
        rounded: The constant in that type.
        num_elements: Elements of the result.
        num_beyond: Of a bound: elements of the result beyond it.
    """

    place: OpPlace
    dtype: str
    kind: Literal["addend", "lower bound", "upper bound", "filling"]
    value: float
    rounded: float
    num_elements: int
    num_beyond: int = 0


@dataclass(frozen=True)
class Accumulation:
    """A total that one line adds to again and again.

    Attributes:
        place: Where.
        dtype: Type of the total.
        num_additions: How often it was added to.
        num_terms: Terms that were not zero, elements counted one by one.
        num_lost: Terms whose addition did not change the total.
        relative_error: Of the last total against float64, by norm.
        term_share: Norm of the largest term over that of the total it was added to.
    """

    place: OpPlace
    dtype: str
    num_additions: int
    num_terms: int
    num_lost: int
    relative_error: float
    term_share: float = 0.0


@dataclass(frozen=True)
class LinalgInput:
    """A matrix in half, or rounded to half just before, that went into a decomposition or a solver.

    Attributes:
        place: Where.
        dtype: The half type.
        relative_change: Norm of the rounding error over that of the matrix; None where the matrix was in half already.
        error: What torch said where it refused.
    """

    place: OpPlace
    dtype: str
    relative_change: float | None = None
    error: str = ""


@dataclass(frozen=True)
class BatchTensor:
    """A tensor of the batch that is in half before the step.

    Attributes:
        name: ``batch.labels``.
        dtype: Its type.
        num_elements: Elements.
        num_nonzero: Elements that are not zero.
        num_subnormal: Elements below the smallest normal number, without zero.
        smallest: Smallest magnitude above zero.
    """

    name: str
    dtype: str
    num_elements: int
    num_nonzero: int
    num_subnormal: int
    smallest: float


@dataclass(frozen=True)
class Root:
    """The loss.

    Attributes:
        dtype: Its type.
        value: Its value.
        place: The operation that made it.
    """

    dtype: str
    value: float
    place: OpPlace | None = None


@dataclass(frozen=True)
class DtypeAudit:
    """One step, forward and backward.

    Attributes:
        uses: Operations by place and types, in program order.
        narrowings: Conversions that lose something.
        constants: Constants that vanish.
        accumulations: Totals that one line adds to.
        linalg: Matrices in half.
        batch: Tensors of the batch in half.
        root: The loss; None where there is none or the step did not come so far.
        half_parameters: Types of the parameters below float32.
        num_ops: Operations seen.
    """

    uses: tuple[OpUse, ...] = ()
    narrowings: tuple[Narrowing, ...] = ()
    constants: tuple[VanishedConstant, ...] = ()
    accumulations: tuple[Accumulation, ...] = ()
    linalg: tuple[LinalgInput, ...] = ()
    batch: tuple[BatchTensor, ...] = ()
    root: Root | None = None
    half_parameters: tuple[str, ...] = ()
    num_ops: int = 0


HALF = frozenset(
    ("float16", "bfloat16", "complex32", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
)
"""Types below float32."""
