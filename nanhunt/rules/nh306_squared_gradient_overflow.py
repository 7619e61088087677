"""squared-gradient-overflow: the optimizer squared a finite gradient, and the running mean or sum became infinite.

What it does:
    Holds where ``exp_avg_sq``, ``max_exp_avg_sq``, ``square_avg`` or ``sum`` of the optimizer became infinite in this
    very step, while the gradient there is finite.

Why it matters:
    The square of a float32 gradient above 1.8e19 is infinite. From then on the update of these weights is x/inf, which
    is 0: they never move again, no loss ever becomes NaN, and a checkpoint carries the infinity on.

Use instead:
    Look for what made so large a gradient in this step; clip gradients by value before the optimizer sees them. Go on
    from a checkpoint written before this step, or reset this moment.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.updates import SpoiltElement
from nanhunt.rules.optimizer_words import SECOND_MOMENTS, example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        if element.key in SECOND_MOMENTS and element.value == float("inf") and element.was_given_finite:
            return _judgement(element)
    return None


def _judgement(element: SpoiltElement) -> Judgement:
    gradient = element.gradient or 0.0
    limit = LIMITS[element.dtype].max if element.dtype in LIMITS else float("inf")
    alone = gradient * gradient > limit
    square = "its square is" if alone else "added to what was there, its square is"
    beyond = f"; {square} beyond {limit:.3g}" if limit < float("inf") else ""
    return Judgement(
        f"{element.name} became infinite: the gradient is {gradient:.3g} at {list(element.index)}{beyond}",
        evidence={
            "gradient": gradient,
            "limit": limit,
            "first_position": list(element.index),
            "num_infinite": element.num_nonfinite,
        },
        notes=("the update there is x/inf = 0 in every later step: these weights never move again",),
        help=(
            "find what made so large a gradient in this step; clip gradients by value before the optimizer",
            "go on from a checkpoint written before this step: the infinity is saved with the optimizer",
        ),
    )


RULE = Rule("NH306", "squared-gradient-overflow", "squared-gradient-overflow", _judge, goes_before=("NH108", "NH404"))

_INFINITE = {"key": "exp_avg_sq", "value": float("inf"), "gradient": 6.25e20}
FLAGGED = (
    example("aten::addcmul_", **_INFINITE),
    example("aten::_fused_adamw_", **_INFINITE),
    example("aten::addcmul_", optimizer="Adagrad", key="sum", value=float("inf"), gradient=1.5e19),
)
CLEAN = (
    example("aten::addcmul_", key="exp_avg_sq", value=float("inf"), gradient=float("inf")),
    example("aten::addcmul_", key="exp_avg", value=float("inf"), gradient=1e30),
    example("aten::addcmul_", key="exp_avg_sq", value=float("nan"), settings={"betas[1]": float("nan")}),
)
