"""What the rules for batches have in common: one judgement for each tensor."""

from collections.abc import Callable

from nanhunt.records.data_audit import DataAudit, TensorAudit
from nanhunt.rules.registry import Judgement, Outcome


def for_each_tensor(look: Callable[[TensorAudit], Judgement | None]) -> Callable[[DataAudit], Outcome]:
    """A rule for a whole audit from one for a single tensor."""

    def judge(audit: DataAudit) -> Outcome:
        return several([found for tensor in audit.tensors if (found := look(tensor)) is not None])

    return judge


def several(found: list[Judgement]) -> Outcome:
    """None, the one, or all."""
    return tuple(found) if len(found) > 1 else found[0] if found else None


def number_of(part: int, whole: int, noun: str) -> str:
    """``3 of 24 samples``."""
    return f"{part:,} of {whole:,} {noun}{'' if whole == 1 else 's'}"
