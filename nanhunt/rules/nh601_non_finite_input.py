"""non-finite-input: the batch held NaN or infinity before any operation of the step.

What it does:
    Looks at every tensor of the batch before the forward pass, and at tensors that no traced operation wrote at their
    first use. It says how many samples are affected, and whether a channel or a whole sample is, where the first
    dimension is known to be that of the samples.

Why it matters:
    No change to model, loss or optimizer can mend a step whose input is lost.

Use instead:
    Check recordings where they are read; refuse or repair them there.

Known limits:
    Labels and weights of a loss have rules of their own, as far as their names or the loss that takes them tell. A
    table that holds -inf alone beside its numbers may be a mask, or logarithms of probabilities: then what could not
    take it is named instead, a softmax or ``logsumexp`` over nothing but -inf; not so where -inf itself is the loss.
"""

from nanhunt.records.labels import is_label, is_loss_weight
from nanhunt.records.ops import Spread, StateSource, ValueFacts
from nanhunt.rules.batch_words import batch_judgement
from nanhunt.rules.registry import Case, Judgement, Rule

_MASK_HELP = (
    "if it is a mask or the logarithm of 0, look at what is picked or summed there: no label may be of a masked class;"
    " if it is data, look at how it was read"
)


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "batch":
        return None
    if is_label(source.name) or is_loss_weight(source.name):
        return None
    if source.facts.num_neginf == source.facts.num_nonfinite and (source.deliberate or source.spread is None):
        return batch_judgement(source, _MASK_HELP)
    return batch_judgement(source, "look at how this sample was read; refuse or repair it there")


RULE = Rule("NH601", "non-finite-input", "non-finite-input", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
_CHANNEL = ValueFacts((4, 3), "float32", num_nan=4)
_MASK = ValueFacts((3,), "float32", num_neginf=1, abs_max=0.0)
FLAGGED = (
    Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2), spread=Spread(1))),
    Case(StateSource(-1, "batch", "input 0", _CHANNEL, (0, 2), spread=Spread(4, 0, ((1, 2),)))),
    Case(StateSource(-1, "batch", "", _FACTS, (1, 2))),
    Case(StateSource(-1, "batch", "mask", _MASK, (1,), deliberate=True)),
)
CLEAN = (
    Case(StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))),
    Case(StateSource(-1, "batch", "batch.labels", _FACTS, (1, 2))),
)
