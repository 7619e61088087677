"""What the rules for non-finite state have in common."""

from collections.abc import Iterable

from nanhunt.numerics import count
from nanhunt.records.ops import StateSource
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement

_SHOWN = 3

SINCE = "it was there when it was first looked at: made so at construction, loaded so, or written so by an earlier step"
"""Where state that no traced operation wrote may have its values from."""


def state_judgement(case: Case, source: StateSource, *, when: str, notes: Iterable[str], help_text: str) -> Judgement:
    """What is there and since when, and what else of its kind is."""
    what = f"{source.kind} {source.name}".strip()
    facts = source.facts
    evidence: dict[str, object] = {
        "num_nonfinite": facts.num_nonfinite,
        "num_elements": facts.num_elements,
        "first_position": list(source.first_index),
    }
    others = [other.name for other in case.trace.sources if other.kind == source.kind and other is not source]
    if others:
        evidence["num_others"] = len(others)
    shown = [name for name in others if name][:_SHOWN]
    named = f": {', '.join(shown)}{' and others' if len(others) > len(shown) else ''}" if shown else ""
    more = (f"{len(others):,} more of kind {source.kind} {'is' if len(others) == 1 else 'are'} non-finite{named}",)
    where = f", first at {list(source.first_index)}" if facts.num_nonfinite < facts.num_elements else ""
    return Judgement(
        f"{what} holds {describe(facts)} {when}{where}",
        evidence=evidence,
        notes=(*notes, *(more if others else ())),
        help=(help_text,),
    )


def is_of(case: Case, kind: str) -> StateSource | None:
    """The first offender where it is state of this kind."""
    source = case.offender
    return source if isinstance(source, StateSource) and source.kind == kind else None


def others_of(case: Case, kind: str) -> str:
    """``2 tensors of optimizer state`` where any of this kind is non-finite as well; '' where none is."""
    number = sum(1 for other in case.trace.sources if other.kind == kind and other is not case.offender)
    return count(number, f"tensor of {kind}", f"tensors of {kind}") if number else ""
