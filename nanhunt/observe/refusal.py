"""A finite matrix that a decomposition refuses: singular, not positive-definite, not converging."""

import torch
from torch import Tensor

from nanhunt.observe.call import Call, Here
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord

_CHECK = "_linalg_check_errors"
_MAX_POSITIONS = 8


def refused_matrix(call: Call, here: Here, step: int, micro_step: int) -> tuple[OpRecord, OffenderEvidence] | None:
    """Describes the matrices of the batch that were refused.

    Args:
        call: The operation that raised: the check of the error codes that a decomposition gave.
        here: Where it stood.
        step: Optimizer step.
        micro_step: Part of an accumulated step.

    Returns:
        None if another operation raised.
    """
    if call.traits.name != _CHECK or len(call.args) < 2 or not isinstance(call.args[0], Tensor):
        return None
    codes, name = call.args[0], str(call.args[1]).removeprefix("torch.").replace(".", "_")
    places = torch.atleast_1d(codes).nonzero()
    positions = tuple(tuple(int(number) for number in place) for place in places[:_MAX_POSITIONS])
    record = OpRecord(
        call.index,
        f"aten::{name}",
        "birth",
        here.phase,
        here.module,
        here.source,
        forward_index=here.forward_index,
        forward_op=here.forward_op,
        step=step,
        micro_step=micro_step,
    )
    return record, OffenderEvidence(len(places), positions if codes.dim() else (), ())
