"""non-finite-input: the batch held NaN or infinity before any operation of the step.

What it does:
    Looks at every tensor of the batch before the forward pass, and at tensors that no traced operation wrote at their
    first use. It says how many samples are affected, and whether a channel or a whole sample is.

Why it matters:
    No change to model, loss or optimizer can mend a step whose input is lost.

Use instead:
    Check recordings where they are read; refuse or repair them there.

Known limits:
    Labels and weights of a loss have rules of their own, as far as their names or the loss that takes them tell.
"""

from nanhunt.records.labels import is_label, is_loss_weight
from nanhunt.records.ops import Spread, StateSource, ValueFacts
from nanhunt.rules.batch_words import batch_judgement
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "batch":
        return None
    if is_label(source.name) or is_loss_weight(source.name):
        return None
    return batch_judgement(source, "look at how this sample was read; refuse or repair it there")


RULE = Rule("NH601", "non-finite-input", "non-finite-input", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
_CHANNEL = ValueFacts((4, 3), "float32", num_nan=4)
FLAGGED = (
    Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2), spread=Spread(1))),
    Case(StateSource(-1, "batch", "input 0", _CHANNEL, (0, 2), spread=Spread(4, 0, ((1, 2),)))),
    Case(StateSource(-1, "batch", "", _FACTS, (1, 2))),
)
CLEAN = (
    Case(StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))),
    Case(StateSource(-1, "batch", "batch.labels", _FACTS, (1, 2))),
)
