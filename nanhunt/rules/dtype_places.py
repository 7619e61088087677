"""What the rules of the dtype audit share: one finding for what is alike at one line of several modules."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.dtype_audit import HALF, OpPlace, OpUse, ShadowError

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
"""Spacing of the numbers just above 1."""


class Placed(Protocol):
    """A record with a place."""

    @property
    def place(self) -> OpPlace:
        """Where."""


Record = TypeVar("Record", bound=Placed)


def location(place: OpPlace, tensor: str = "") -> Location:
    """The place in the terms of a finding."""
    return Location(
        place.phase,
        op=place.op,
        forward_op=place.forward_op,
        module=place.module,
        tensor=tensor,
        source=place.source,
    )


def by_line(records: Iterable[Record]) -> list[list[Record]]:
    """Records of the same forward operation at the same line, whatever module runs it, with those of its backward.

    What has no line is told by its module.
    """
    groups: dict[Hashable, list[Record]] = {}
    for record in records:
        place = record.place
        where: Any = (place.source.file, place.source.line) if place.source is not None else place.module
        groups.setdefault((where, place.forward_op or place.op), []).append(record)
    return list(groups.values())


def in_modules(records: Iterable[Placed]) -> tuple[str, ...]:
    """A note that names the first modules of several."""
    names = list(dict.fromkeys(record.place.module or "the model itself" for record in records))
    if len(names) < 2:
        return ()
    shown = ", ".join(names[:3])
    return (f"in {count(len(names), 'module')}: {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}",)


def joined_error(uses: list[OpUse]) -> ShadowError | None:
    """The errors of several uses as one, of the phase that comes first; None where nothing was compared."""
    found: ShadowError | None = None
    for use in uses:
        if use.error is not None and use.place.phase == uses[0].place.phase:
            found = use.error if found is None else found.joined(use.error)
    return found


def half_inputs(use: OpUse) -> tuple[str, ...]:
    """The types below float32 of its inputs."""
    return tuple(dtype for dtype in use.inputs if dtype.removesuffix(" ()") in HALF)


def lost_to(error: ShadowError) -> Iterator[str]:
    """What became of elements that float64 has finite, in words."""
    if error.num_overflow:
        yield f"{count(error.num_overflow, 'element')} infinite"
    if error.num_nan:
        yield f"{count(error.num_nan, 'element')} NaN"
    if error.num_to_zero:
        yield f"{count(error.num_to_zero, 'element')} zero"
