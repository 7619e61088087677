"""adam-eps-underflow: the eps of an adaptive optimizer is 0 in the type of its state, and the update was divided by 0.

What it does:
    Looks at the first weight that the step spoilt: its second moment is exactly 0, and ``eps``, which is not, is 0 once
    it is rounded to the type of the weights.

Why it matters:
    Adam, AdamW, RMSprop and Adagrad divide by the root of the second moment plus ``eps``. In float16 numbers below
    3e-8 are 0, and the default ``eps`` is 1e-8: where the gradient is 0 the update is 0/0, which is NaN, and where its
    square underflows it is infinite. One step with a word that did not occur in the batch is enough.

Example:
    ``torch.optim.Adam(model.half().parameters())``

Use instead:
    Weights and optimizer state in float32 and the forward pass under autocast. ``fused=True``, which computes in
    float32, or an ``eps`` of 1e-4 or more hide it.

Known limits:
    Only optimizers whose state has torch's names for the second moment are known.

References:
    pytorch#147437
"""

from typing import Any

from nanhunt.numerics import LIMITS, count
from nanhunt.records.updates import SpoiltElement
from nanhunt.rules.optimizer_words import divides_by_zero, example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        if element.was_given_finite and element.settings.get("eps", 0.0) > 0 and divides_by_zero(element):
            return _judgement(element)
    return None


def _judgement(element: SpoiltElement) -> Judgement:
    assert element.denominator is not None
    eps, smallest = element.settings["eps"], LIMITS[element.dtype].smallest_subnormal
    key, _ = element.denominator
    where = count(element.num_nonfinite, "element")
    return Judgement(
        f"{element.optimizer} divided by 0 in {element.parameter}: eps={eps:g} is 0 in {element.dtype},"
        f" and {key} is 0 at {list(element.index)}",
        evidence={
            "eps": eps,
            "smallest_subnormal": smallest,
            "gradient": element.gradient,
            "first_position": list(element.index),
            "num_nonfinite": element.num_nonfinite,
        },
        notes=(
            f"{where} of {element.num_elements:,} in {element.parameter} became non-finite: 0/0 where the gradient is"
            " 0, x/0 where its square underflows",
        ),
        help=("keep weights and optimizer state in float32 and autocast the forward pass",),
    )


RULE = Rule("NH301", "adam-eps-underflow", "adam-eps-underflow", _judge, goes_before=("NH103", "NH113"))


_HALF: dict[str, Any] = {"dtype": "float16", "gradient": 0.0, "state": {"exp_avg": 0.0, "exp_avg_sq": 0.0}}

FLAGGED = (
    example(**_HALF),
    example("aten::_foreach_addcdiv_", **{**_HALF, "gradient": 1e-5, "value": float("inf")}),
    example(**{**_HALF, "optimizer": "RMSprop", "state": {"square_avg": 0.0}}),
)
CLEAN = (
    example(**{**_HALF, "dtype": "float32"}),
    example(**{**_HALF, "dtype": "bfloat16"}),
    example(**{**_HALF, "settings": {"lr": 1e-3, "eps": 1e-4}}),
    example(**{**_HALF, "settings": {"lr": 1e-3, "eps": 0.0}}),
    example(**{**_HALF, "state": {"exp_avg_sq": 1e-7}}),
    example(**{**_HALF, "gradient": float("inf")}),
)
