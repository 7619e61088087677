"""non-finite-moment: the state of the optimizer holds NaN or infinity.

What it does:
    Looks at every tensor of the state, as it stands or in a file.

Why it matters:
    A NaN moment makes its weight NaN in the next step, whatever the gradient. An infinite second moment is quieter: the
    update is divided by it and is 0, for ever, for infinity does not decay. Loading good weights beside such a state
    brings the fault back.

Use instead:
    Go on from an earlier checkpoint, or load the weights alone and let the moments begin anew.
"""

from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import StateFacts, StoredState
from nanhunt.rules.registry import Judgement, Rule


def _judge(state: StoredState) -> Judgement | None:
    found = [one for one in state.entries if one.num_nan or one.num_inf]
    if not found:
        return None
    first = max(found, key=lambda one: one.num_nan > 0)
    parts = [f"{one:,} {kind}" for one, kind in ((first.num_nan, "NaN"), (first.num_inf, "infinite")) if one]
    others = len(found) - 1
    still = first.is_second_moment and not first.num_nan
    effect = "these weights never move again" if still else "the next step makes these weights non-finite"
    return Judgement(
        f"{first.what} in {state.origin} holds {' and '.join(parts)} of {count(first.num_elements, 'element')}",
        evidence={"num_nan": first.num_nan, "num_inf": first.num_inf, "first_index": list(first.first_index)},
        notes=(effect, *((f"{count(others, 'more non-finite tensor')} in the state",) if others else ())),
        help=("load the weights without the optimizer's state, or go on from an earlier checkpoint",),
        location=Location("optimizer", tensor=first.parameter),
    )


RULE = Rule("NH340", "non-finite-moment", "non-finite-moment", _judge, StoredState)


def _state(num_nan: int, num_inf: int) -> StoredState:
    entry = StateFacts("head.weight", "exp_avg_sq", num_elements=64, num_nan=num_nan, num_inf=num_inf)
    return StoredState("the file", (replace(entry, is_second_moment=True),))


FLAGGED = (_state(0, 1), _state(64, 0))
CLEAN = (_state(0, 0), StoredState("the file"))
