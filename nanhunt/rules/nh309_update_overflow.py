"""update-overflow: the optimizer took a weight beyond the largest number, from a finite gradient and a finite rate.

What it does:
    Holds where a weight became infinite in the step while its gradient, the optimizer's state there and every number of
    its group are finite, and the step divided by nothing that is 0.

Why it matters:
    The loss of this step, its gradients and the state are all finite: the next forward pass is the first to show it.

Use instead:
    Look at the size of the update, which is the learning rate times what the gradient became, and at the size of the
    weights in the steps before.

Known limits:
    Where the weights had been growing for several steps, ``diverging-weights`` says more.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.updates import SpoiltElement
from nanhunt.rules.optimizer_words import divides_by_zero, example, spoilt, sustained_growth
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if sustained_growth(case) is not None:
        return None
    for element in spoilt(case):
        if _is_overflow(element):
            limit = LIMITS[element.dtype].max
            rate = element.settings["lr"]
            return Judgement(
                f"{element.optimizer} took {element.parameter} beyond {limit:.3g} at {list(element.index)}:"
                f" lr={rate:g}, gradient {element.gradient:.3g}",
                evidence={
                    "lr": rate,
                    "gradient": element.gradient,
                    "limit": limit,
                    "first_position": list(element.index),
                    "num_infinite": element.num_nonfinite,
                },
                notes=("gradient, optimizer state and settings are finite there",),
                help=("look at the learning rate of this step, and at what made so large a gradient",),
            )
    return None


def _is_overflow(element: SpoiltElement) -> bool:
    is_weight = not element.key and math.isinf(element.value) and element.dtype in LIMITS
    is_given_finite = element.was_given_finite and all(math.isfinite(value) for value in element.state.values())
    return is_weight and is_given_finite and "lr" in element.settings and not divides_by_zero(element)


RULE = Rule("NH309", "update-overflow", "update-overflow", _judge, goes_before=("NH108", "NH404"))

_SGD = {"optimizer": "SGD", "value": float("-inf"), "gradient": 4.0, "state": {}, "settings": {"lr": 1e38}}
FLAGGED = (example("aten::add_", **_SGD), example("aten::_foreach_add_", **_SGD))
CLEAN = (
    example("aten::add_", **{**_SGD, "gradient": float("inf")}),
    example("aten::add_", **{**_SGD, "settings": {"lr": float("inf")}}),
    example("aten::add_", **{**_SGD, "state": {"momentum_buffer": float("inf")}}),
    example("aten::addcdiv_", dtype="float16", value=float("inf"), gradient=1e-5, state={"exp_avg_sq": 0.0}),
)
