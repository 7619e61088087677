"""non-finite-input: the batch held NaN or infinity before any operation of the step.

What it does:
    Looks at every tensor of the batch before the forward pass.

Why it matters:
    No change to model, loss or optimizer can mend a step whose input is lost.

Use instead:
    Check recordings and labels where they are read; refuse or repair them there.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "batch":
        return None
    name = source.name or "a tensor that no variable names"
    return Judgement(
        f"{name} holds {describe(source.facts)}, first at {list(source.first_index)}",
        evidence={
            "num_nonfinite": source.facts.num_nonfinite,
            "first_position": list(source.first_index),
            **({"sample": source.first_index[0]} if len(source.first_index) > 1 else {}),
        },
        help=("look at how this sample was read; refuse or repair it there",),
    )


RULE = Rule("NH601", "non-finite-input", "non-finite-input", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
FLAGGED = (Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2))),)
CLEAN = (Case(StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))),)
