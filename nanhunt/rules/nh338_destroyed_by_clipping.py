"""destroyed-by-clipping: clipping by total norm turns these gradients into zeros or NaN.

What it does:
    Clips copies of the gradients that there are, of a batch or stored ones, and counts those that were finite and came
    out as zeros or non-finite.

Why it matters:
    The total norm is one number for all parameters. One infinite gradient makes it infinite: that one becomes NaN,
    every other one 0. One NaN makes all of them NaN. Finite gradients of 1e19 and more make it overflow in float32,
    and all become 0. No error is raised, so clipping does not help against non-finite gradients, it spreads them.

Use instead:
    ``clip_grad_norm_(..., error_if_nonfinite=True)``, or leave out the step, and find where the first one is born.

Known limits:
    It says what clipping adds, not where the gradient comes from: ``nanhunt replay`` does.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import Clipping
from nanhunt.rules.registry import Judgement, Rule


def _judge(clipping: Clipping) -> Judgement | None:
    spread = clipping.num_nonfinite_after - clipping.num_nonfinite
    # A norm far above the limit may well round the smallest gradients of a finite set to zero.
    is_zeroed = clipping.num_zeroed > 0 and (clipping.num_nonfinite > 0 or clipping.num_zeroed == clipping.num_tensors)
    if spread <= 0 and not is_zeroed:
        return None
    parts = [f"{clipping.num_zeroed:,} to zeros"] if is_zeroed else []
    parts += [f"{spread:,} more to non-finite values"] if spread > 0 else []
    before = (
        f"{count(clipping.num_nonfinite, 'is', 'are')} non-finite before"
        if clipping.num_nonfinite
        else "all of them are finite before"
    )
    return Judgement(
        f"clipping turns {' and '.join(parts)}, of {count(clipping.num_tensors, 'gradient')}; {before}",
        evidence={"norm": clipping.norm, "max_norm": clipping.max_norm, "num_nonfinite": clipping.num_nonfinite},
        notes=("clipping spreads the damage; it did not begin it",),
        help=("leave out a step whose norm is non-finite: clip_grad_norm_(..., error_if_nonfinite=True)",),
        location=Location("optimizer"),
    )


RULE = Rule("NH338", "destroyed-by-clipping", "non-finite-norm", _judge, Clipping)

_INFINITY = float("inf")
FLAGGED = (
    Clipping(0.5, _INFINITY, 57, num_nonfinite=1, num_nonfinite_after=1, num_zeroed=56),
    Clipping(0.5, float("nan"), 57, num_nonfinite=1, num_nonfinite_after=57),
    Clipping(0.5, 3e19, 4, num_zeroed=4),
)
CLEAN = (
    Clipping(0.5, 3.0, 57),
    Clipping(0.5, 3e9, 57, num_zeroed=1),
    Clipping(0.5, _INFINITY, 1, num_nonfinite=1, num_nonfinite_after=1),
)
