"""Totals that one line adds to again and again, kept in float64 beside."""

from dataclasses import dataclass, replace

from torch import Tensor

from nanhunt.audit.dtype_memory import MemoryNotes
from nanhunt.audit.shadow import is_half, name_of, wide
from nanhunt.records.dtype_audit import Accumulation, OpPlace

MAX_ELEMENTS = 65_536
"""Elements of a total that are followed, the first ones."""


@dataclass
class _Total:
    """One total; its float64 twin begins with the second addition, for most totals never get one."""

    place: OpPlace
    dtype: str
    exact: Tensor | None = None
    num_additions: int = 1
    num_terms: int = 0
    num_lost: int = 0
    error: float = 0.0
    share: float = 0.0


class Totals:
    """Follows them through memory: what an addition gives is the total that the next one adds to."""

    def __init__(self) -> None:
        self._of: MemoryNotes[_Total] = MemoryNotes()
        self._all: list[_Total] = []

    def added(self, place: OpPlace, before: Tensor, term: Tensor, output: Tensor, alpha: float) -> None:
        """An addition of two tensors has run.

        Args:
            place: Where.
            before: What the first one held before; a copy where the operation wrote to it.
            term: The second one.
            output: The sum.
            alpha: What the term was multiplied by.
        """
        if (
            before.dtype != output.dtype
            or before.shape != output.shape
            or not (is_half(output.dtype) or name_of(output.dtype) == "float32")
        ):
            return
        total = self._of.get(output) or self._of.get(before)
        if (total is None or not _is_one_line(total.place, place)) and alpha == 1 and term.shape == output.shape:
            other = self._of.get(term)
            if other is not None and _is_one_line(other.place, place):
                total, before, term = other, term, before
        if total is None or not _is_one_line(total.place, place):
            total = _Total(place, name_of(output.dtype))
            self._all.append(total)
        else:
            self._follow(total, before, term, output, alpha)
        self._of.put(output, total)

    def _follow(self, total: _Total, before: Tensor, term: Tensor, output: Tensor, alpha: float) -> None:
        old, new = _head(before), _head(output)
        added = _head(wide(term).expand(output.shape)) * alpha
        if total.exact is None:
            total.exact = wide(old)
        if total.exact.shape != added.shape:
            return
        total.exact = total.exact + added
        total.num_additions += 1
        total.num_terms += int((added != 0).sum())
        total.num_lost += int(((added != 0) & (new == old) & old.isfinite()).sum())
        size = float(wide(old).norm())
        total.share = max(total.share, float(added.norm()) / size if size else 0.0)
        finite = new.isfinite()
        norm = float(total.exact[finite].norm())
        total.error = float((wide(new) - total.exact)[finite].norm()) / norm if norm else 0.0

    def records(self) -> tuple[Accumulation, ...]:
        """Those that were added to more than once."""
        return tuple(
            Accumulation(one.place, one.dtype, one.num_additions, one.num_terms, one.num_lost, one.error, one.share)
            for one in self._all
            if one.num_additions > 1
        )


def _head(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:MAX_ELEMENTS]


def _is_one_line(one: OpPlace, other: OpPlace) -> bool:
    """Whether it is the same operation of the same line, which each of many layers may run."""
    if one.source is None or other.source is None:
        return one == other
    return replace(one, module=other.module) == other
