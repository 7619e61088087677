"""diverging-weight-decay: rate times weight decay exceeds 1, so a decayed weight changes sign or grows.

What it does:
    Multiplies the highest planned rate of each group with its weight decay, where a step is known to multiply a weight
    by ``1 - rate x decay``. Above 2 it is an error, between 1 and 2 a warning.

Why it matters:
    Above 2 the factor is below -1: a weight without gradient grows at every step with alternating sign, up to
    infinity. This is the one way in which weight decay alone makes values non-finite. Between 1 and 2 it changes sign
    at each step.

Use instead:
    A decay of 0.01 to 0.1 with a rate of 1e-2 at most. A large number is often one that was written for an optimizer
    whose decay is not multiplied by the rate.

Known limits:
    With a decay that is added to the gradient of an adaptive optimizer there is no such factor, and the rule is
    silent.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, GroupSettings
from nanhunt.rules.registry import Judgement, Rule


def _judge(settings: GroupSettings) -> Judgement | Skip | None:
    large = [group for group in settings.groups if group.peak_lr * group.weight_decay > 1]
    found = [group for group in large if group.decay == "direct"]
    if not found:
        unknown = [group for group in large if group.decay == "unknown"]
        reason = "rate times weight decay exceeds 1, but how this optimizer applies its decay is not known"
        return Skip("weight decay", reason) if unknown else None
    worst = max(found, key=lambda group: group.peak_lr * group.weight_decay)
    product = worst.peak_lr * worst.weight_decay
    what = "grows and changes sign" if product > 2 else "changes sign"
    return Judgement(
        f"rate x weight decay is {product:.4g} in group {worst.index}: a weight without gradient {what} at each step",
        evidence={"rate": worst.peak_lr, "weight_decay": worst.weight_decay, "factor_per_step": 1 - product},
        notes=(f"so it is in {count(len(found), 'group')}",) if len(found) > 1 else (),
        help=("lower the weight decay: in this optimizer it is multiplied by the rate",),
        location=Location("optimizer"),
        severity="error" if product > 2 else "warning",
    )


RULE = Rule("NH328", "diverging-weight-decay", "diverging-weight-decay", _judge, GroupSettings)


def _settings(rate: float, decay: float) -> GroupSettings:
    return GroupSettings("AdamW", (GroupFacts(0, rate, decay, decay="direct", peak_lr=rate),))


FLAGGED = (_settings(0.1, 30.0), _settings(1.0, 1.5))
CLEAN = (
    _settings(1e-3, 0.1),
    GroupSettings("Adam", (GroupFacts(0, 0.1, 30.0, decay="through the gradient", peak_lr=0.1),)),
)
