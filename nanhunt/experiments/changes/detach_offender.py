"""Stops the gradient at the operation whose backward pass went non-finite."""

from collections.abc import Iterator

from nanhunt.capture.step import Change
from nanhunt.experiments.changes import Diagnosis
from nanhunt.experiments.substitute import Substitution, tensors_mapped
from nanhunt.findings import Skip


def changes(diagnosis: Diagnosis) -> Iterator[Change | Skip]:
    """One experiment, for an offender in the backward pass with a known line."""
    offender = diagnosis.offender
    if offender is None or offender.phase != "backward" or offender.source is None:
        return
    if offender.own_backward is not None:
        # What its forward calls is out of autograd's sight already; nothing there could be detached.
        yield Skip("no gradient through the offender", "it runs in a backward of the user's own, which stays in place")
        return
    line, op = offender.source, diagnosis.forward_op
    yield Change(
        "detach-offender",
        f"no gradient through {op.removeprefix('aten::').strip('_')} (its outputs detached)",
        "offender",
        around=lambda: Substitution(line, op, outputs=tensors_mapped(lambda tensor: tensor.detach())),
    )
