"""The whole step in float64: tells a fault of rounding from one of mathematics."""

from collections.abc import Iterator

import torch

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis


def changes(diagnosis: Diagnosis) -> Iterator[Change]:
    """One experiment."""
    yield Change(
        "float64",
        "the whole step in float64",
        "precision",
        dtype=torch.float64,
        note="finite in float64: the values differ there by what float32 rounds away",
    )
