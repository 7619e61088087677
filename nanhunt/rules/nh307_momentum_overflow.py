"""momentum-overflow: the running sum of finite gradients that an optimizer keeps became infinite.

What it does:
    Holds where ``momentum_buffer`` or ``exp_avg`` of the optimizer became infinite in this very step, while the
    gradient there is finite.

Why it matters:
    With a momentum of 0.99 the buffer comes to a hundred gradients. In float16 gradients of 700 are enough to fill it,
    although each of them, and every update, is harmless. The weight is infinite in the same step.

Use instead:
    Weights and optimizer state in float32; a dampening of the same size as the momentum; smaller gradients by a mean
    instead of a sum in the loss.
"""

from nanhunt.numerics import LIMITS
from nanhunt.rules.optimizer_words import example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule

_MOMENTA = ("momentum_buffer", "exp_avg")
_FACTORS = ("momentum", "betas[0]")


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        if element.key not in _MOMENTA or abs(element.value) != float("inf") or not element.was_given_finite:
            continue
        factors = [(name, element.settings[name]) for name in _FACTORS if element.settings.get(name)]
        limit = LIMITS[element.dtype].max if element.dtype in LIMITS else None
        held = " and ".join(f"{name}={value:g}" for name, value in factors)
        return Judgement(
            f"{element.name} became infinite in {element.dtype}: the gradient is {element.gradient:.3g} at"
            f" {list(element.index)}{', with ' + held if held else ''}",
            evidence={
                "gradient": element.gradient,
                "limit": limit,
                **dict(factors),
                "first_position": list(element.index),
                "num_infinite": element.num_nonfinite,
            },
            help=("keep weights and optimizer state in float32, or the gradients smaller",),
        )
    return None


RULE = Rule("NH307", "momentum-overflow", "momentum-overflow", _judge, goes_before=("NH108", "NH404"))

_SGD = {"optimizer": "SGD", "key": "momentum_buffer", "dtype": "float16", "value": float("inf"), "gradient": 2e4}
FLAGGED = (
    example("aten::add_", **_SGD, state={}, settings={"lr": 1e-6, "momentum": 0.99}),
    example("aten::_foreach_lerp_", key="exp_avg", value=float("-inf"), gradient=-3e38),
)
CLEAN = (
    example("aten::add_", **{**_SGD, "gradient": float("inf")}),
    example("aten::add_", **{**_SGD, "value": float("nan")}),
    example("aten::add_", **{**_SGD, "key": ""}),
)
