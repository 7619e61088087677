"""gradient-overflow: a gradient is beyond the largest number of its type.

What it does:
    Holds where an operation of the backward pass gave an infinity of finite numbers, and either the same operation in
    float64 is beyond the type, or the operation is a sum or product, which has no other way to infinity.

Why it matters:
    A gradient that grows by the same factor at every layer or time step reaches 3.4e38 in float32, or in bfloat16,
    which ends there too. It was out of proportion long before; the infinity is only where that shows.

Use instead:
    Bounded recurrences (orthogonal or gated), truncated or clipped backward passes through time, norms between layers,
    a smaller initial scale.

Known limits:
    The growth itself is reported by growing-gradient while it is still finite.

References:
    Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063.
"""

from nanhunt.rules.nh219_half_precision_gradient_overflow import judged_overflow, overflow_case, overflowed
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    found = overflowed(case)
    if found is None or found[0] == "float16":
        return None
    return judged_overflow(case, *found, "look for what grows from layer to layer, or from time step to time step")


RULE = Rule("NH220", "gradient-overflow", "gradient-overflow", _judge)

FLAGGED = (overflow_case("mul", "float32", 1e30, 1e30), overflow_case("mm", "bfloat16", 0.0, 0.0))
CLEAN = (
    overflow_case("mul", "float16", 4096.0, 30.0),
    overflow_case("div", "float32", 1.0, 0.0),
    overflow_case("mul", "float32", float("inf"), 0.0, ingredients=(3,)),
)
