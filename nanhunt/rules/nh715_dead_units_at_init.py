"""dead-units-at-init: most units behind a ReLU give 0 for the whole batch, with fresh weights.

What it does:
    Looks at every ReLU that is given the output of a layer, as a module or as a function. It holds where more than 80
    % of its units are 0 for every sample and position, at least 32 of them, for every initialisation.

Why it matters:
    A unit that is 0 everywhere has no gradient. Nothing brings it back.

Use instead:
    Biases that begin at 0, inputs with mean 0, weights of the usual scale; a leaky ReLU where units must survive.

Known limits:
    Small batches kill units by chance, so fewer than 32 samples and positions are not judged. Where the input hardly
    reaches a layer, half of its units are dead: that is the vanishing signal, and stays below the limit.
"""

from nanhunt.findings import Location
from nanhunt.records.init_audit import ActivationAtInit, ActivationPass, InitAudit
from nanhunt.rules.registry import Judgement, Rule

SHARE = 0.8
MIN_OBSERVATIONS = 32


def dead_share(activation: ActivationAtInit) -> float:
    """Share of dead units, the least of any initialisation; 0 where too little was seen."""
    if activation.op != "relu" or min(one.num_observations for one in activation.passes) < MIN_OBSERVATIONS:
        return 0.0
    return min(one.num_dead / max(one.num_units, 1) for one in activation.passes)


def most_dead(audit: InitAudit) -> ActivationAtInit | None:
    """The first activation whose units are nearly all dead."""
    return next((one for one in audit.activations if dead_share(one) > SHARE), None)


def _judge(audit: InitAudit) -> Judgement | None:
    first = most_dead(audit)
    if first is None or not audit.is_finite:
        return None
    seen = first.passes[0]
    number = sum(dead_share(one) > SHARE for one in audit.activations)
    return Judgement(
        f"{seen.num_dead:,} of {seen.num_units:,} units behind {first.after or 'the model'} are 0 for all"
        f" {seen.num_observations:,} samples and positions",
        evidence={
            "dead_share": dead_share(first),
            "input_mean": seen.input_mean,
            "input_std": seen.input_std,
            "num_activations": number,
        },
        help=("look at the bias of this layer and at the mean of its input",),
        location=Location("forward", op=first.op, module=first.after),
    )


RULE = Rule("NH715", "dead-units-at-init", "dead-units-at-init", _judge, judges=InitAudit)


def _seen(num_dead: int, observations: int = 64, op: str = "relu") -> InitAudit:
    one = ActivationPass(observations, 32, num_dead, input_mean=-10.0, input_std=0.5)
    return InitAudit(1, activations=(ActivationAtInit("act", op, "fc", (one,)),))


FLAGGED = (_seen(32), _seen(28))
CLEAN = (_seen(16), _seen(32, observations=8), _seen(0), InitAudit(1))
