"""missing-state: the optimizer has no state for weights that have been trained.

What it does:
    Holds where a file says that steps were taken, and the state of an optimizer that keeps one is empty; and where some
    parameters that get a gradient have no state, while others have.

Why it matters:
    Weights were restored, the optimizer was not. Adam begins with moments of 0: its first updates have the full size of
    the rate in every weight, without the warm-up there was at the beginning, and the loss jumps.

Use instead:
    Save and load ``optimizer.state_dict()`` with the weights; else warm up again.

Known limits:
    A part that gets its first gradient in the batch of the audit, such as an expert that was not used before, looks the
    same as one whose state was lost. Parameters of which nobody knows whether they get a gradient are not counted:
    unused ones never have state.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import StoredState, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(state: StoredState) -> Judgement | None:
    if not state.num_with_state and state.num_parameters and state.keeps_state and (state.step or 0) > 0:
        return Judgement(
            f"{state.origin} says step {state.step:,}, and its optimizer has no state",
            evidence={"step": state.step, "num_parameters": state.num_parameters},
            notes=("the moments begin at 0 with the first step after loading",),
            help=("save optimizer.state_dict() after a step, or warm up again",),
            location=Location("optimizer"),
        )
    if not state.without:
        return None
    return Judgement(
        f"{count(len(state.without), 'parameter')} with a gradient and without state, beside {state.num_with_state:,}"
        " that have some",
        evidence={
            "num_without": len(state.without),
            "num_with_state": state.num_with_state,
            "num_parameters": state.num_parameters,
            "first": some(state.without),
        },
        notes=(
            "their moments begin at 0, and their first update has the full size of the rate",
            "parameters that had no gradient in any step so far, as an expert that was not used, look the same",
        ),
        help=("if they were trained before, check that the state was restored for all groups",),
        location=Location("optimizer", tensor=state.without[0]),
    )


RULE = Rule("NH343", "missing-state", "missing-state", _judge, StoredState, "warning")

FLAGGED = (
    StoredState("the file", num_parameters=4, step=1000, keeps_state=True),
    StoredState("the optimizer", num_parameters=4, num_with_state=3, without=("head.bias",)),
)
CLEAN = (
    StoredState("the file", num_parameters=4, step=1000, keeps_state=False),
    StoredState("the file", num_parameters=4, step=0, keeps_state=True),
    StoredState("the file", num_parameters=4, num_with_state=3, step=1000, keeps_state=True),
)
