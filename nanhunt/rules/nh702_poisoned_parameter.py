"""poisoned-parameter: a weight was NaN or infinite before the step began.

What it does:
    Looks at every parameter before the forward pass, and at those of models met later at their first use.

Why it matters:
    The step is only where it shows: an earlier one wrote it, or a checkpoint brought it, and this batch is innocent.

Use instead:
    Capture the step that wrote it: run under ``nanhunt.watch`` from a checkpoint that is still finite. Put the
    optimizer's state back together with the weights: moments that are NaN bring it back in one step.
"""

from nanhunt.records.ops import StateSource, Trace, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import is_of, others_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "parameter")
    if source is None:
        return None
    notes = ["it was there before this step: an earlier one wrote it, or it came with a checkpoint"]
    moments = others_of(case, "optimizer state")
    if moments:
        notes.append(f"{moments} non-finite as well: finite weights alone would not last")
    return state_judgement(
        case,
        source,
        when="before the step",
        notes=notes,
        help_text="run under nanhunt.watch from a checkpoint that is still finite",
    )


RULE = Rule("NH702", "poisoned-parameter", "poisoned-parameter", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
_WEIGHT = StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))
_MOMENT = StateSource(-2, "optimizer state", "exp_avg of head.weight", _FACTS, (1, 2))
FLAGGED = (Case(_WEIGHT), Case(_WEIGHT, trace=Trace(9, (), (_WEIGHT, _MOMENT))))
CLEAN = (Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2))), Case(_MOMENT))
