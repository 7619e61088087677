"""unusable-setting: a number in the optimizer's groups is non-finite or outside its range.

What it does:
    Looks at the rate, the decay, ``eps``, ``betas`` and ``momentum`` of each group: NaN, infinite or negative, and
    betas that are not below 1.

Why it matters:
    An optimizer checks its settings when it is made, not later: a schedule or a checkpoint may write anything into the
    groups. A NaN rate makes every weight NaN in one step.

Use instead:
    Look at what wrote the number: a schedule that divides by a length of 0, a checkpoint of a failed run.
"""

import math

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, GroupSettings
from nanhunt.rules.registry import Judgement, Rule

_NOT_NEGATIVE = ("eps", "betas", "momentum", "alpha", "rho")
_BELOW_ONE = ("betas",)


def _judge(settings: GroupSettings) -> Judgement | None:
    found = [(group.index, name, value) for group in settings.groups for name, value in _wrong(group)]
    if not found:
        return None
    index, name, value = found[0]
    others = len(found) - 1
    return Judgement(
        f"{name} of group {index} is {value:g}",
        evidence={"group": index, name: value},
        notes=(f"{count(others, 'more setting is', 'more settings are')} non-finite or out of range",)
        if others
        else (),
        help=("find what wrote it: a schedule, a checkpoint or the script",),
        location=Location("optimizer"),
    )


def _wrong(group: GroupFacts) -> list[tuple[str, float]]:
    numbers = {
        **({"lr": group.lr} if group.lr is not None else {}),
        "weight_decay": group.weight_decay,
        **group.settings,
    }
    found = []
    for name, value in numbers.items():
        kind = name.partition(".")[0]
        is_known = kind in ("lr", "weight_decay", *_NOT_NEGATIVE)
        is_negative = is_known and value < 0
        if (is_known and not math.isfinite(value)) or is_negative or (kind in _BELOW_ONE and value >= 1):
            found.append((name, value))
    return found


RULE = Rule("NH327", "unusable-setting", "unusable-setting", _judge, GroupSettings)


def _settings(lr: float | None = 1e-4, **settings: float) -> GroupSettings:
    return GroupSettings("AdamW", (GroupFacts(0, lr, settings=settings),))


FLAGGED = (_settings(math.nan), _settings(eps=math.inf), _settings(**{"betas.1": 1.0}), _settings(-1e-3))
CLEAN = (
    _settings(eps=1e-8),
    _settings(0.0),
    _settings(None),
    _settings(**{"betas.0": 0.0}),
    _settings(beta2_decay=-0.8),
)
