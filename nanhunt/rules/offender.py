"""What the rules for faults of the forward pass ask of the first offender."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import Exact, Operand
from nanhunt.rules.registry import Case

NARROW = {
    "float16": LIMITS["float16"].max,
    "float8_e5m2": 57344.0,
    "float8_e5m2fnuz": 57344.0,
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
}
"""Largest values of the types whose range is smaller than that of float32."""

EXPONENTIALS = ("exp", "exp2", "expm1", "sinh", "cosh")

# Of finite inputs these make an infinity by overflow alone; a sum of products whose parts overflow both ways makes NaN.
_PLAIN = "mul add sub rsub square addcmul lerp neg dot mm bmm mv addmm addmv baddbmm linear convolution sum cumsum mean"
_ONLY_OVERFLOW = frozenset(
    (
        *_PLAIN.split(),
        "prod",
        "cumprod",
        "mse_loss",
        "_to_copy",
        "copy",
        "index_add",
        "scatter_add",
        "linalg_matrix_exp",
    )
)
_MATRIX_NAMES = "dot mm bmm mv addmm addmv baddbmm linear convolution linalg_matrix_exp"
_OF_MATRICES = frozenset(_MATRIX_NAMES.split())


def is_written_by_user(case: Case) -> bool:
    """Whether the offender is an operation of the forward pass, or of a backward that the user wrote."""
    if case.op is None or case.evidence is None or not case.op.outputs:
        return False
    return case.op.phase in ("forward", "data", "weights") or (
        case.op.phase == "backward" and case.op.own_backward is not None
    )


def base_name(case: Case) -> str:
    """``div`` for ``aten::div_`` and ``aten::_foreach_div``; '' where there is no operation of torch's."""
    name = case.op.op if case.op is not None else ""
    return name.removeprefix("aten::").removeprefix("_foreach_").rstrip("_") if name.startswith("aten::") else ""


def is_in_place(case: Case) -> bool:
    """Whether the operation has written over what it was given."""
    return case.op is not None and case.op.op.endswith("_") and case.operand("self") is None


def values_of(case: Case, name: str) -> tuple[float, ...]:
    """The operand at the offending elements; a plain number once for each of them; empty where it is not known."""
    operand = case.operand(name)
    if operand is None or case.evidence is None:
        return ()
    return operand.at_offenders * (len(case.evidence.positions) if operand.facts is None else 1)


def has_nan_input(case: Case) -> bool:
    """Whether NaN went in, as a number or in a tensor."""
    return any(
        math.isnan(operand.at_offenders[0]) if operand.facts is None else bool(operand.facts.num_nan)
        for operand in _operands(case)
    )


def has_infinite_input(case: Case) -> bool:
    """Whether an infinity went in."""
    return bool(case.op is not None and case.op.ingredients) or any(
        math.isinf(operand.at_offenders[0])
        if operand.facts is None
        else bool(operand.facts.num_posinf or operand.facts.num_neginf)
        for operand in _operands(case)
    )


def _operands(case: Case) -> tuple[Operand, ...]:
    return case.evidence.operands if case.evidence is not None else ()


def at_elements(case: Case) -> str:
    """``at 3 elements, first at [0, 1]``."""
    assert case.evidence is not None
    first = list(case.evidence.positions[0]) if case.evidence.positions else []
    return f"at {count(case.evidence.num_offending, 'element')}, first at {first}"


def at_first(case: Case, described: Sequence[object]) -> str:
    """``at 3 elements, first at [0, 1]`` where all are described alike, else ``at [0, 1], the first of 3 elements``."""
    assert case.evidence is not None
    number = case.evidence.num_offending
    if len(set(described)) == 1 and (len(described) > 1 or number == 1):
        return at_elements(case)
    return f"at {list(case.evidence.positions[0])}, the first of {count(number, 'element')}"


def quoted(case: Case, values: Sequence[float], *, digits: int = 6) -> str:
    """``0 at 2 elements, first at [0]``; where they differ, ``0 at [0], the first of 2 elements, down to -5``."""
    assert case.evidence is not None
    texts = [f"{value + 0.0:.{digits}g}" for value in values]
    lowest, highest = texts[values.index(min(values))], texts[values.index(max(values))]
    ends = [f"down to {lowest}"] if lowest != texts[0] else []
    ends += [f"up to {highest}"] if highest != texts[0] else []
    among = f" among the first {len(values)}" if case.evidence.num_offending > len(values) else ""
    further = f", {' and '.join(ends)}{among}" if ends else ""
    return f"{texts[0]} {at_first(case, texts)}{further}"


def digits_apart(value: float, limit: float) -> int:
    """How many digits it takes to see that two numbers are not the same, at least six."""
    return next((digits for digits in range(6, 17) if f"{value:.{digits}g}" != f"{limit:.{digits}g}"), 17)


def at_nan(case: Case) -> str:
    """``2 of 3 elements are NaN, first at [0, 1]``, as far as the elements described one by one tell which."""
    assert case.op is not None
    assert case.evidence is not None
    pairs = zip(case.evidence.positions, case.evidence.results, strict=True)
    first = next((f", first at {list(position)}" for position, result in pairs if math.isnan(result)), "")
    number, elements = case.op.outputs[0].num_nan, count(case.evidence.num_offending, "offending element")
    return f"{number:,} of {elements} {'is' if number == 1 else 'are'} NaN{first}"


def numbers(case: Case, **more: object) -> dict[str, object]:
    """The evidence that every finding of an element has."""
    assert case.evidence is not None
    first = list(case.evidence.positions[0]) if case.evidence.positions else []
    return {"num_offending": case.evidence.num_offending, "first_position": first, **more}


def where_infinity_came_from(case: Case) -> tuple[str, ...]:
    """One line for each earlier place that an infinity came from."""
    lines = []
    for index in case.op.ingredients if case.op is not None else ():
        record = case.trace.op_at(index)
        source = next((source for source in case.trace.sources if source.index == index), None)
        if record is not None:
            place = f", line {record.source.line}: {record.source.text}" if record.source is not None else ""
            lines.append(f"the infinity came from {record.op}{place}")
        elif source is not None:
            lines.append(f"the infinity was in {source.kind} {source.name}".rstrip())
    return tuple(lines[:3])


WRITTEN_OVER = "the operand was written over by the result, which tells what it must have been"


@dataclass(frozen=True)
class Overflow:
    """A result beyond the range of its type.

    Attributes:
        dtype: The type.
        limit: Its largest value.
        exact: The described elements in float64; empty where they are not known.
    """

    dtype: str
    limit: float
    exact: tuple[Exact, ...] = ()

    @property
    def is_partial(self) -> bool:
        """Whether the first result itself would fit, and only the way to it does not."""
        return bool(self.exact) and abs(self.exact[0].value) <= self.limit

    @property
    def reached(self) -> float | None:
        """The magnitude that did not fit, at the first element."""
        if not self.exact:
            return None
        return self.exact[0].largest if self.is_partial else abs(self.exact[0].value)


def overflow_of(case: Case) -> Overflow | None:
    """How finite inputs went beyond the range of the result's type; None where that is not what happened."""
    if not is_written_by_user(case) or has_nan_input(case) or has_infinite_input(case):
        return None
    assert case.op is not None
    assert case.evidence is not None
    dtype = case.op.outputs[0].dtype
    limit = NARROW.get(dtype) or (LIMITS[dtype].max if dtype in LIMITS else None)
    if limit is None or base_name(case) in EXPONENTIALS:
        return None
    exact = case.evidence.exact
    over = [math.isfinite(one.value) and limit < max(one.largest, abs(one.value)) < math.inf for one in exact]
    if exact and all(over):
        return Overflow(dtype, limit, exact)
    return Overflow(dtype, limit) if _can_only_overflow(case) else None


def _can_only_overflow(case: Case) -> bool:
    assert case.op is not None
    assert case.evidence is not None
    name, has_nan = base_name(case), any(math.isnan(result) for result in case.evidence.results)
    if name in ("div", "pow"):
        base = values_of(case, "other" if name == "div" else "self")
        return bool(base) and not has_nan and all(value != 0.0 for value in base)
    return name in _ONLY_OVERFLOW and (not has_nan or name in _OF_MATRICES)


def describe_overflow(case: Case, found: Overflow) -> str:
    """What went beyond the type, with the magnitude and the limit."""
    assert case.op is not None
    if found.reached is None:
        limit = f"{found.dtype} ends at {found.limit:.6g}"
        return f"{case.op.op} of finite numbers went out of range {at_elements(case)}; {limit}"
    digits = digits_apart(found.reached, found.limit)
    limit = f"{found.dtype} ends at {found.limit:.{digits}g}"
    first = found.exact[0]
    if found.is_partial:
        total = f"terms of {case.op.op} that come to {first.value:.6g} reach {first.largest:.{digits}g} on the way"
        return f"{total} {at_elements(case)}; {limit}"
    alike = [one.value for one in found.exact if abs(one.value) > found.limit]
    values = alike if len(alike) == len(found.exact) else alike[:1]
    return f"{case.op.op} comes to {quoted(case, values, digits=digits)}; {limit}"


_SETTINGS = ("dim", "eps", "momentum", "reduction", "correction", "ord", "p", "keepdim")


def factors(case: Case) -> tuple[str, ...]:
    """The operands of an overflow: their values there, or how large they are."""
    parts = []
    for operand in _operands(case):
        if operand.name in _SETTINGS:
            continue
        if operand.facts is None or len(operand.at_offenders) > 0:
            parts.append(f"{operand.name} {operand.at_offenders[0]:.6g}")
        elif operand.facts.abs_max is not None:
            parts.append(f"{operand.name} up to {operand.facts.abs_max:.6g}")
    held = (f"it was given {', '.join(parts[:4])}",) if parts else ()
    return (*held, WRITTEN_OVER) if is_in_place(case) else held
