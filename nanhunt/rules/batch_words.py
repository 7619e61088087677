"""What the rules for a non-finite batch have in common."""

from nanhunt.numerics import count
from nanhunt.records.ops import Spread, StateSource
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Judgement

_SHOWN = 4


def batch_judgement(source: StateSource, help_text: str) -> Judgement:
    """What is there, where it lies, and how many samples it takes."""
    name = source.name or "a tensor that no variable names"
    evidence: dict[str, object] = {
        "num_nonfinite": source.facts.num_nonfinite,
        "first_position": list(source.first_index),
    }
    notes: tuple[str, ...] = ()
    if source.spread is not None and len(source.facts.shape) > 1:
        evidence["sample"] = source.first_index[0]
        evidence["num_samples"] = source.spread.num_samples
        notes = tuple(_notes(source, source.spread))
    message = f"{name} holds {describe(source.facts)}, first at {list(source.first_index)}"
    return Judgement(message, evidence=evidence, notes=notes, help=(help_text,))


def _notes(source: StateSource, spread: Spread) -> list[str]:
    shape = source.facts.shape
    notes = []
    if spread.num_samples == shape[0]:
        notes.append(f"every one of {count(shape[0], 'sample')} is affected" if shape[0] > 1 else "")
    else:
        notes.append(f"{spread.num_samples:,} of {count(shape[0], 'sample')} affected")
    if spread.num_whole_samples:
        notes.append(f"{count(spread.num_whole_samples, 'sample')} non-finite throughout")
    for dim in sorted({dim for dim, _ in spread.whole_slices}):
        places = [str(place) for at, place in spread.whole_slices if at == dim]
        more = ", ..." if len(places) > _SHOWN else ""
        notes.append(f"non-finite throughout the batch at {', '.join(places[:_SHOWN])}{more} of dimension {dim}")
    return [note for note in notes if note]
