"""poisoned-buffer: a buffer, such as running statistics or an average, was NaN or infinite before the step began.

What it does:
    Looks at every buffer before the forward pass, and at those of models met later at their first use.

Why it matters:
    A running mean or variance takes in every batch and never lets go of an infinity. In training a norm uses the
    statistics of the batch, so that loss, gradients and weights stay finite: evaluation alone reads the buffer, and
    gives NaN ever after.

Use instead:
    For running statistics a checkpoint that holds finite ones, or ``reset_running_stats()`` and some healthy batches in
    training mode; weights need not be touched. A buffer that is computed once, such as ``1 / arange(n)``, is wrong from
    the start: compute it so that it is finite.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import SINCE, is_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "buffer")
    if source is None:
        return None
    is_running = source.name.rpartition(".")[2] in ("running_mean", "running_var")
    notes = [SINCE]
    if is_running:
        notes.append("training normalises by the batch and stays finite; evaluation reads this buffer")
    return state_judgement(
        case,
        source,
        when="before the step",
        notes=notes,
        help_text="reset_running_stats(), and look for the batch that did it"
        if is_running
        else "look at how it is computed when the model is built, and at what a checkpoint or a step writes to it",
    )


RULE = Rule("NH703", "poisoned-buffer", "poisoned-buffer", _judge)

_FACTS = ValueFacts((4,), "float32", num_neginf=1)
FLAGGED = tuple(
    Case(StateSource(-1, "buffer", name, _FACTS, (1,))) for name in ("body.norm.running_mean", "observer.lowest")
)
CLEAN = (Case(StateSource(-1, "parameter", "body.norm.weight", _FACTS, (1,))),)
