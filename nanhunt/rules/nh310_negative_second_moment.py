"""negative-second-moment: an optimizer took the root of a second moment that is below 0.

What it does:
    Holds where a root in the optimizer step gave NaN of a finite number, and the optimizer's state there tells why: a
    second moment below 0, or a centred one, whose mean square less the square of the mean is below 0 by rounding.

Why it matters:
    A mean of squares is never negative; the difference of two nearly equal ones is, by one rounding, as soon as the
    gradient is steady. Weights of the wrong sign in a loaded or averaged state do the same.

Example:
    ``torch.optim.RMSprop(parameters, centered=True)`` with a gradient that stays the same for a hundred steps.

Use instead:
    The uncentred form, or a difference that is kept at 0 or above before the root. For a state below 0, a look at where
    it was loaded or changed.
"""

from nanhunt.numerics import LIMITS
from nanhunt.records.updates import SpoiltElement
from nanhunt.rules.optimizer_words import SECOND_MOMENTS, example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule

_ROOTS = ("sqrt", "rsqrt", "_foreach_sqrt", "_foreach_rsqrt", "pow", "_foreach_pow")
# Roundings by which two means, each of many terms, may differ.
_ROUNDINGS = 64


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        assert case.op is not None
        is_root = case.op.op.removeprefix("aten::").rstrip("_") in _ROOTS or "_fused_" in case.op.op
        if is_root and element.was_given_finite and element.value != element.value:
            found = _negative(element) or _cancelled(element)
            if found is not None:
                return found
    return None


def _negative(element: SpoiltElement) -> Judgement | None:
    below = [key for key in SECOND_MOMENTS if element.state.get(key, 0.0) < 0]
    if not below:
        return None
    value = element.state[below[0]]
    return Judgement(
        f"{element.optimizer} took the root of {below[0]} of {element.parameter}, which is {value:.3g} at"
        f" {list(element.index)}",
        evidence={below[0]: value, "first_position": list(element.index), "num_nonfinite": element.num_nonfinite},
        help=("look at where this state was loaded, averaged or changed: a mean of squares is never negative",),
    )


def _cancelled(element: SpoiltElement) -> Judgement | None:
    square, mean = element.state.get("square_avg"), element.state.get("grad_avg")
    if square is None or mean is None or element.dtype not in LIMITS:
        return None
    if square - mean * mean > _ROUNDINGS * LIMITS[element.dtype].eps * square:
        return None
    return Judgement(
        f"{element.optimizer} took the root of square_avg - grad_avg^2 of {element.parameter}, which rounding took"
        f" below 0 at {list(element.index)}",
        evidence={
            "square_avg": square,
            "grad_avg": mean,
            "gradient": element.gradient,
            "first_position": list(element.index),
            "num_nonfinite": element.num_nonfinite,
        },
        notes=("the gradient there hardly changes from step to step: its mean square is the square of its mean",),
        help=("use centered=False",),
    )


RULE = Rule("NH310", "negative-second-moment", "negative-second-moment", _judge, goes_before=("NH110",))

_CENTRED = {"optimizer": "RMSprop", "gradient": 1.0617527, "settings": {"lr": 1e-4, "centered": 1.0}}
FLAGGED = (
    example("aten::sqrt_", **_CENTRED, state={"square_avg": 1.1273167, "grad_avg": 1.0617517}),
    example("aten::_foreach_sqrt", state={"exp_avg": 0.1, "exp_avg_sq": -1e-9}),
)
CLEAN = (
    example("aten::sqrt_", **_CENTRED, state={"square_avg": 1.2, "grad_avg": 1.06}),
    example("aten::sqrt", state={"exp_avg_sq": 0.1}),
    example("aten::addcdiv_", state={"exp_avg_sq": -1e-9}),
    example("aten::sqrt_", gradient=float("nan"), state={"exp_avg_sq": -1e-9}),
)
