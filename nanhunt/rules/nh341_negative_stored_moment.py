"""negative-stored-moment: a mean of squares in the optimizer's state is below zero.

What it does:
    Looks for negative elements in ``exp_avg_sq``, ``max_exp_avg_sq`` and ``square_avg``, and in ``sum``, ``acc_delta``
    and others where the settings of the groups are those of the optimizer of torch that keeps squares under this name.

Why it matters:
    The optimizer takes the root of it: the update is NaN. Squares are never negative, so something else wrote it:
    damage to a file or to memory, moments that were averaged or interpolated between checkpoints, quantisation.

Use instead:
    Load the weights without the state, or go on from another checkpoint.
"""

from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import StateFacts, StoredState
from nanhunt.rules.registry import Judgement, Rule


def _judge(state: StoredState) -> Judgement | None:
    found = [one for one in state.entries if one.is_second_moment and one.num_negative]
    if not found:
        return None
    first, others = found[0], len(found) - 1
    return Judgement(
        f"{first.what} in {state.origin} is negative in {first.num_negative:,} of"
        f" {count(first.num_elements, 'element')}",
        evidence={"num_negative": first.num_negative, "first_index": list(first.first_index)},
        notes=(
            "the optimizer takes its root, which is NaN",
            *((f"{count(others, 'more second moment')} with negative elements",) if others else ()),
        ),
        help=("load the weights without the optimizer's state",),
        location=Location("optimizer", tensor=first.parameter),
    )


RULE = Rule("NH341", "negative-stored-moment", "negative-stored-moment", _judge, StoredState)


def _state(num_negative: int, *, is_second_moment: bool) -> StoredState:
    key = "exp_avg_sq" if is_second_moment else "exp_avg"
    entry = StateFacts("head.weight", key, num_elements=64, num_negative=num_negative, first_index=(0, 3))
    return StoredState("the file", (replace(entry, is_second_moment=is_second_moment),))


FLAGGED = (_state(2, is_second_moment=True),)
CLEAN = (_state(30, is_second_moment=False), _state(0, is_second_moment=True))
