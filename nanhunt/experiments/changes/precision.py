"""The whole step in float64: tells a fault of rounding from one of mathematics."""

from collections.abc import Iterator

import torch

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.findings import Skip


def changes(diagnosis: Diagnosis) -> Iterator[Change | Skip]:
    """One experiment, where the captured weights are narrower."""
    weights = diagnosis.capture.payload.get("model") or {}
    if any(value.dtype == torch.float64 for value in weights.values()):
        yield Skip("the whole step in float64", "weights are float64 already")
        return
    yield Change(
        "float64",
        "the whole step in float64",
        "precision",
        dtype=torch.float64,
        note="float64 rounds less and overflows later; autocast leaves it alone",
    )
