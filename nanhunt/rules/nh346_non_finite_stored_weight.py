"""non-finite-stored-weight: weights in the file hold NaN or infinity.

What it does:
    Looks at every floating-point tensor beside the optimizer's state.

Why it matters:
    The step that did the damage lies before this file. No setting of the optimizer repairs it.

Use instead:
    An earlier checkpoint, and ``nanhunt.watch`` from there on.

Known limits:
    Buffers that hold infinity on purpose, such as masks, count as well.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import StoredWeights, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(weights: StoredWeights) -> Judgement | None:
    if not weights.bad:
        return None
    return Judgement(
        f"{len(weights.bad):,} of {count(weights.num_tensors, 'tensor')} of weights in the file hold non-finite values",
        evidence={"num_bad": len(weights.bad), "first": some(weights.bad)},
        help=("go back to an earlier checkpoint and run under nanhunt.watch",),
        location=Location("weights", tensor=weights.bad[0]),
    )


RULE = Rule("NH346", "non-finite-stored-weight", "non-finite-state", _judge, StoredWeights)

FLAGGED = (StoredWeights(12, ("head.weight",)),)
CLEAN = (StoredWeights(12),)
