"""non-finite-state: something that was there before the step was NaN or infinite, and it is neither weight nor buffer.

What it does:
    Names what no other rule for state knows: a tensor of the step that no traced operation wrote, of a kind of its own.

Why it matters:
    The step is only where it shows: it came from before, and this batch is innocent.

Use instead:
    Look at what wrote it last, before the trace began.
"""

from nanhunt.records.ops import OpRecord, StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import state_judgement


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource):
        return None
    found = "no operation of the step wrote it"
    return state_judgement(case, source, when="before its first use", notes=(found,), help_text="look at what wrote it")


RULE = Rule("NH701", "non-finite-state", "unknown", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
FLAGGED = (Case(StateSource(-1, "another kind", "cache", _FACTS, (1, 2))),)  # type: ignore[arg-type]
CLEAN = (Case(OpRecord(3, "aten::exp", "birth", "forward", "head", None, outputs=(_FACTS,))),)
