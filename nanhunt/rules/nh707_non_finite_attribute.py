"""non-finite-attribute: a tensor that a module holds as a plain attribute was NaN or infinite.

What it does:
    Looks for a tensor that no operation wrote among the attributes of the model's modules, also in lists and dicts.

Why it matters:
    A plain attribute is neither parameter nor buffer: no checkpoint holds it, ``.to(device)`` leaves it behind, and no
    look at the state of the model shows it.

Use instead:
    ``register_buffer``, and a check where the value is computed: a spread of 0, a mean over nothing.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import is_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "module attribute")
    if source is None:
        return None
    return state_judgement(
        case,
        source,
        when="before the step",
        notes=("it is neither parameter nor buffer: no checkpoint holds it",),
        help_text="look at how it was computed, and register it as a buffer",
    )


RULE = Rule("NH707", "non-finite-attribute", "non-finite-attribute", _judge)

_FACTS = ValueFacts((3,), "float32", num_posinf=1)
FLAGGED = (Case(StateSource(-1, "module attribute", "scaler.deviation", _FACTS, (2,))),)
CLEAN = (Case(StateSource(-1, "buffer", "scaler.deviation", _FACTS, (2,))),)
