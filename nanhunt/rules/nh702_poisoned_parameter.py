"""poisoned-parameter: a weight was NaN or infinite before the step began.

What it does:
    Looks at every parameter before the forward pass, and at those of models met later at their first use.

Why it matters:
    The step is only where it shows, and this batch is innocent: the weight was made so (``torch.empty`` that nobody
    initialised, a gain of 1/0), a checkpoint brought it, or an earlier step wrote it.

Use instead:
    A look at the weight right after the model is built, and right after a checkpoint is loaded. If it is finite there,
    a step wrote it: run under ``nanhunt.watch`` from there. Put the optimizer's state back together with the weights:
    moments that are NaN bring it back in one step.
"""

from nanhunt.records.ops import StateSource, Trace, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import SINCE, is_of, others_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "parameter")
    if source is None:
        return None
    notes = [f"nothing has written to it since {source.op} made it" if source.op else SINCE]
    moments = others_of(case, "optimizer state")
    if moments:
        notes.append(f"{moments} non-finite as well: finite weights alone would not last")
    return state_judgement(
        case,
        source,
        when="before the step",
        notes=notes,
        help_text="initialise it when the model is built"
        if source.op
        else "look at it right after the model is built and after a checkpoint is loaded; if it is finite there, run"
        " under nanhunt.watch from there",
    )


RULE = Rule("NH702", "poisoned-parameter", "poisoned-parameter", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
_WEIGHT = StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))
_MOMENT = StateSource(-2, "optimizer state", "exp_avg of head.weight", _FACTS, (1, 2))
_EMPTY = StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2), op="aten::empty")
FLAGGED = (Case(_WEIGHT), Case(_EMPTY), Case(_WEIGHT, trace=Trace(9, (), (_WEIGHT, _MOMENT))))
CLEAN = (Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2))), Case(_MOMENT))
