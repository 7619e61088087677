"""saturated-activation-at-init: most of what a tanh or a sigmoid gives is at its ends, with fresh weights.

What it does:
    Looks at every tanh and sigmoid that is given the output of a layer. It holds where more than half of its elements
    have next to no slope (|tanh| > 0.99; a sigmoid outside of 0.005 to 0.995), because what goes in varies widely and
    not because it is shifted, for every initialisation.

Why it matters:
    Where the slope is gone the gradient is gone, and everything before learns slowly or not at all.

Use instead:
    Inputs of mean 0 and deviation 1, or ``xavier`` weights.

Known limits:
    A gate that a bias holds shut or open, and the small prior with which detectors begin, are deliberate: an input
    whose mean is larger than its deviation does not count.
"""

from nanhunt.findings import Location
from nanhunt.records.init_audit import ActivationAtInit, ActivationPass, InitAudit
from nanhunt.rules.registry import Judgement, Rule

SHARE = 0.5


def _is_saturated(activation: ActivationAtInit) -> bool:
    return activation.op != "relu" and all(
        one.saturated_share > SHARE and one.input_std > abs(one.input_mean) for one in activation.passes
    )


def _judge(audit: InitAudit) -> Judgement | None:
    found = [activation for activation in audit.activations if _is_saturated(activation)]
    if not found or not audit.is_finite:
        return None
    first = found[0]
    seen = min(first.passes, key=lambda one: one.saturated_share)
    return Judgement(
        f"{seen.saturated_share:.0%} of what {first.op} gives behind {first.after or 'the model'} is at its ends;"
        f" its input has deviation {seen.input_std:.3g}",
        evidence={"saturated_share": seen.saturated_share, "input_std": seen.input_std, "num_activations": len(found)},
        help=("bring the input to deviation 1, or draw smaller weights",),
        location=Location("forward", op=first.op, module=first.after),
    )


RULE = Rule(
    "NH716",
    "saturated-activation-at-init",
    "saturated-activation-at-init",
    _judge,
    judges=InitAudit,
    severity="warning",
)


def _seen(share: float, mean: float, std: float) -> InitAudit:
    one = ActivationPass(64, 32, saturated_share=share, input_mean=mean, input_std=std)
    return InitAudit(1, activations=(ActivationAtInit("act", "tanh", "fc", (one,)),))


FLAGGED = (_seen(0.9, 0.0, 20.0),)
CLEAN = (_seen(0.1, 0.0, 1.0), _seen(1.0, -8.0, 0.5), InitAudit(1))
