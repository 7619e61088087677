"""non-finite-loss-weight: a weight that the loss gives to a class or a sample was NaN or infinite from the start.

What it does:
    Holds where one of torch's losses was given the tensor as ``weight`` or ``pos_weight``.

Why it matters:
    One over the number of samples of a class is infinite for a class that has none. As long as none of its samples
    comes along, infinity times 0 makes NaN of the others, or nothing is wrong at all until the first one does.

Example:
    ``weight = 1 / torch.bincount(labels, minlength=3)``

Use instead:
    A count that is kept at 1 or more before the quotient, or a weight of 0 for a class without samples.
"""

from nanhunt.records.labels import is_loss_weight
from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.batch_words import batch_judgement
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "batch" or not is_loss_weight(source.name):
        return None
    return batch_judgement(source, "look at the counts it was made of: a class without samples")


RULE = Rule("NH605", "non-finite-loss-weight", "non-finite-loss-weight", _judge)

_FACTS = ValueFacts((3,), "float32", num_posinf=1)
FLAGGED = tuple(
    Case(StateSource(-1, "batch", name, _FACTS, (2,)))
    for name in ("weight (weight of cross_entropy)", "pos_weight of binary_cross_entropy_with_logits")
)
CLEAN = (Case(StateSource(-1, "batch", "input edge_weight", _FACTS, (2,))),)
