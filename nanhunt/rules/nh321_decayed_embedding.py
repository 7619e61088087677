"""decayed-embedding: weight decay acts on an embedding table.

What it does:
    Lists trainable weights of ``Embedding`` and ``EmbeddingBag`` in a group with weight decay. A table that is also
    the output layer is a linear map and left alone.

Why it matters:
    It is hygiene. A row that does not occur in a batch has a gradient of 0, and decoupled decay shrinks it all the
    same, so rare rows fade. It cannot make a value non-finite.

Use instead:
    A group with ``weight_decay=0.0``; or, where the decay is meant, an ``ignore`` of this rule with the reason.

Known limits:
    A positional embedding that is a bare parameter of a module is not known to be one.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    found = [one for one in setup.decayed("embedding") if not one.asks_no_decay]
    if not found:
        return None
    return Judgement(
        f"weight decay of {max(setup.decay_of(one) for one in found):g} acts on {count(len(found), 'embedding')}",
        evidence={"num_decayed": len(found), "first": some([one.name for one in found])},
        notes=setup.decay_notes(found),
        help=("put them into a group with weight_decay=0.0, or ignore this rule where the decay is meant",),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH321", "decayed-embedding", "decayed-embedding", _judge, OptimizerSetup, "warning")

_GROUPS = (GroupFacts(0, 1e-4, 0.05, decay="direct", kept_share=0.951), GroupFacts(1, 1e-4))
_TABLE = ParameterFacts("tokens.weight", "Embedding", "embedding", shape=(100, 8), groups=(0,))

FLAGGED = (OptimizerSetup("AdamW", _GROUPS, (_TABLE,)),)
CLEAN = (
    OptimizerSetup("AdamW", _GROUPS, (ParameterFacts("tokens.weight", "Embedding", "embedding", groups=(1,)),)),
    OptimizerSetup("AdamW", _GROUPS, (ParameterFacts("tokens.weight", "Embedding", "matrix", groups=(0,)),)),
)
