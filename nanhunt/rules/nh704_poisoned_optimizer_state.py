"""poisoned-optimizer-state: a moment of the optimizer was NaN or infinite before the step began.

What it does:
    Looks at the optimizer's state before its first step inside the trace, and later at what something other than a
    step has written.

Why it matters:
    Weights and batch are finite, and the step makes the weights NaN all the same: momentum is added to the gradient.
    This is how a run that was taken back to finite weights dies again at once. A second moment at infinity does the
    opposite: its weights never move again.

Use instead:
    Weights and optimizer state from the same, finite checkpoint; or an optimizer without the state of this parameter.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import is_of, others_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "optimizer state")
    if source is None:
        return None
    weights = others_of(case, "parameter")
    notes = [
        "it was there before this step: it was loaded so, or something outside the traced steps wrote it",
        f"{weights} non-finite as well" if weights else "the weights were finite until the optimizer used it",
    ]
    return state_judgement(
        case,
        source,
        when="before the step",
        notes=notes,
        help_text="restore the optimizer's state with the weights, both finite, or make a new optimizer",
    )


RULE = Rule("NH704", "poisoned-optimizer-state", "poisoned-optimizer-state", _judge)

_FACTS = ValueFacts((1, 8), "float32", num_posinf=1)
FLAGGED = (Case(StateSource(-1, "optimizer state", "momentum_buffer of 2.weight", _FACTS, (0, 3))),)
CLEAN = (Case(StateSource(-1, "parameter", "2.weight", _FACTS, (0, 3))),)
