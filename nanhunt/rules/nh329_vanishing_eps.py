"""vanishing-eps: with these settings and this type, a small gradient makes a weight non-finite.

What it does:
    Steps a copy of each group's settings once, from a fresh state, on weights of 1 in each type that the group holds,
    with gradients from 0 to 1, and reports those with which the weight became non-finite. The largest of them is
    sought to within a percent.

Why it matters:
    Adam divides by the root of the second moment plus ``eps``. In float16 the usual ``eps`` of 1e-8 is 0, for the
    smallest number is 6e-8, and the square of a gradient below some 8e-3 is 0 in the second moment: the update is 0/0
    or a division by 0, and one step is enough.

Use instead:
    Weights and optimizer state in float32 under autocast; else ``eps=1e-4``, or ``fused=True``, which computes in
    float32.

Known limits:
    The first step only: the second moment of a later one may hold what a fresh one does not.

References:
    pytorch#147437.
"""

from nanhunt.findings import Location
from nanhunt.numerics import LIMITS
from nanhunt.records.optimizer_audit import ProbeStep
from nanhunt.rules.registry import Judgement, Rule


def _judge(probe: ProbeStep) -> Judgement | None:
    if not probe.bad_gradients:
        return None
    largest = max(probe.bad_gradients)
    evidence: dict[str, object] = {"largest_bad_gradient": largest, "num_parameters": probe.num_parameters}
    if probe.eps is not None:
        evidence = {"eps": probe.eps} | evidence
    if probe.dtype in LIMITS:
        evidence["smallest_number"] = LIMITS[probe.dtype].smallest_subnormal
    upto = f"from 0 to {largest:.3g}" if largest > 0 and 0.0 in probe.bad_gradients else f"of {largest:.3g}"
    settings = f"eps = {probe.eps:g} in {probe.dtype}" if probe.eps is not None else probe.dtype
    return Judgement(
        f"with {settings}, a gradient {upto} makes a weight non-finite in the first step",
        evidence=evidence,
        help=("keep weights and optimizer state in float32 and autocast the forward pass",),
        location=Location("optimizer"),
    )


RULE = Rule("NH329", "vanishing-eps", "vanishing-eps", _judge, ProbeStep)

FLAGGED = (ProbeStep(0, "float16", 1e-8, 4, (0.0, 1e-5, 1e-3)), ProbeStep(0, "float32", 0.0, 4, (0.0,)))
CLEAN = (ProbeStep(0, "float32", 1e-8, 4),)
