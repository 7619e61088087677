"""uninitialised-memory: memory that nobody had written was read, and held NaN or infinity.

What it does:
    Follows what ``empty``, ``empty_like`` and ``resize_`` return until it is written. Holds where it is read before.

Why it matters:
    It holds whatever was there: zeros mostly, and so the mistake stays hidden until the memory is used again. It comes
    and goes with batch size, machine and order of operations, and no seed helps.

Use instead:
    ``zeros`` or ``full``; or a write to all of it before the first read. With deterministic algorithms on,
    ``torch.utils.deterministic.fill_uninitialized_memory`` fills it with NaN, so that every such read is seen.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.state_words import is_of, state_judgement


def _judge(case: Case) -> Judgement | None:
    source = is_of(case, "uninitialised memory")
    if source is None:
        return None
    return state_judgement(
        case,
        source,
        when=f"at its first use: it came from {source.op or 'an operation that leaves it as it is'}",
        notes=("nothing wrote to these elements before they were read",),
        help_text="make it with zeros, or write all of it before it is read",
    )


RULE = Rule("NH705", "uninitialised-memory", "uninitialised-memory", _judge)

_FACTS = ValueFacts((4, 3), "float32", num_nan=3)
FLAGGED = (Case(StateSource(-1, "uninitialised memory", "", _FACTS, (2, 0), op="aten::empty", found_at=9)),)
CLEAN = (Case(StateSource(-1, "constant", "", _FACTS, (2, 0))),)
