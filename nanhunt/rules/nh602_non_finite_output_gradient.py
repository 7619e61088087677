"""non-finite-output-gradient: the gradient that came back to the model's output was NaN or infinite already.

What it does:
    Looks at the gradients of the model's outputs where only the model is replayed, from its own inputs, and no
    operation of the model accounts for them.

Why it matters:
    The fault lies in the loss, behind the model: no change to the model can mend it.

Use instead:
    Pass the batches through ``hunt.batches`` and give a target with ``loss(model, batch)``; the loss is then replayed
    and the operation inside it is named.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "output gradient":
        return None
    return Judgement(
        f"{source.name} holds {describe(source.facts)} as the loss gave it, first at {list(source.first_index)}",
        evidence={"num_nonfinite": source.facts.num_nonfinite, "first_position": list(source.first_index)},
        notes=("no operation of the model made it; the loss behind the model is not part of what was replayed",),
        help=("give a target with loss(model, batch), and pass the batches through hunt.batches",),
    )


RULE = Rule("NH602", "non-finite-output-gradient", "non-finite-output-gradient", _judge)

_FACTS = ValueFacts((6, 1), "float32", num_posinf=1)
FLAGGED = (Case(StateSource(-1, "output gradient", "gradient of output 0", _FACTS, (1, 0))),)
CLEAN = (Case(StateSource(-1, "constant", "", _FACTS, (1, 0))),)
