"""non-finite-constant: a tensor that no operation of the step wrote, and no variable names, was NaN or infinite.

What it does:
    Names tensors that were non-finite at their first use and are neither batch nor state of a model or optimizer: made
    before the trace, inside a library, or by code that no operation shows.

Why it matters:
    A mask of -inf is one of them, and harmless where it is used as a mask; this one reached the loss, a gradient or a
    weight.

Use instead:
    Look at the line that is named: what it reads was made earlier, or elsewhere.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import is_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "constant")
    if source is None:
        return None
    return state_judgement(
        case,
        source,
        when="at its first use",
        notes=("no operation of the step wrote it: it was made before, or where nobody looks",),
        help_text="look at where what this line reads was made",
    )


RULE = Rule("NH706", "non-finite-constant", "non-finite-constant", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
FLAGGED = tuple(Case(StateSource(-1, "constant", name, _FACTS, (1, 2))) for name in ("loss", ""))
CLEAN = (Case(StateSource(-1, "uninitialised memory", "", _FACTS, (1, 2))),)
