"""The variants a target offers: the same weights with one design choice taken the other way."""

from collections.abc import Iterator

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis


def changes(diagnosis: Diagnosis) -> Iterator[Change]:
    """One experiment per variant."""
    for title, variant in diagnosis.target.variants().items():
        yield Change(title.replace(" ", "-"), f"{title} (the target's own variant)", "model", target=variant)
