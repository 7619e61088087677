"""state-of-no-parameter: the optimizer's state has entries for tensors that are in no group.

What it does:
    Compares the keys of the state with the parameters in the groups.

Why it matters:
    The entries are never used. So it is where parameters were replaced after the state had been made or loaded: their
    successors begin without moments.

Use instead:
    Make and load the optimizer after the model has its final parameters.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import StoredState, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(state: StoredState) -> Judgement | None:
    if not state.unknown:
        return None
    return Judgement(
        f"{state.origin} holds state of {count(len(state.unknown), 'tensor')} in no group",
        evidence={"num_unknown": len(state.unknown), "first": some(state.unknown)},
        help=("make the optimizer after the model has its final parameters",),
        location=Location("optimizer"),
    )


RULE = Rule("NH344", "state-of-no-parameter", "state-of-no-parameter", _judge, StoredState, "warning")

FLAGGED = (StoredState("the file", num_parameters=4, num_with_state=4, unknown=("parameter 7",)),)
CLEAN = (StoredState("the file", num_parameters=4, num_with_state=4),)
