"""One kind of change a file, found by its name; each offers the experiments that apply to a diagnosis.

A file holds ``changes(diagnosis) -> Iterator[Change | Skip]``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from nanhunt.capture.format import Capture
from nanhunt.capture.step import Batches, Change
from nanhunt.findings import Finding, Skip
from nanhunt.records.ops import OpRecord
from nanhunt.targets import Target


@dataclass(frozen=True)
class Diagnosis:
    """What is known when experiments are chosen.

    Attributes:
        capture: The saved step.
        target: What it is replayed with.
        finding: The first offender as the rules judged it; None where the step is finite.
        offender: Its record, where it is an operation.
        control: Batches that did not fail; empty if there are none.
    """

    capture: Capture
    target: Target
    finding: Finding | None
    offender: OpRecord | None
    control: Batches

    @property
    def forward_op(self) -> str:
        """Name of the forward operation at the offending line; '' if there is none."""
        if self.offender is None:
            return ""
        return self.offender.forward_op or self.offender.op


# The order in which they are tried and shown; a file that is not listed comes last.
_ORDER = ("detach_offender", "target_variants", "replaced_samples", "decay_groups", "learning_rate")


def proposed_changes(diagnosis: Diagnosis) -> Iterator[Change | Skip]:
    """Every experiment that applies, in the order of the table."""
    names = [module.name for module in iter_modules(__path__)]
    for name in sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        module: Any = import_module(f"{__name__}.{name}")
        yield from module.changes(diagnosis)
