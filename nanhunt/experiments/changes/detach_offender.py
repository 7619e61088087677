"""Stops the gradient at the operation whose backward pass went non-finite."""

from collections.abc import Iterator

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.experiments.substitute import Substitution, tensors_mapped


def changes(diagnosis: Diagnosis) -> Iterator[Change]:
    """One experiment, for an offender in the backward pass with a known line."""
    offender = diagnosis.offender
    if offender is None or offender.phase != "backward" or offender.source is None:
        return
    line, op = offender.source, diagnosis.forward_op
    yield Change(
        "detach-offender",
        f"no gradient through {op.removeprefix('aten::').strip('_')} (its outputs detached)",
        "offender",
        around=lambda: Substitution(line, op, outputs=tensors_mapped(lambda tensor: tensor.detach())),
    )
