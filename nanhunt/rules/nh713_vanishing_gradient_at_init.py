"""vanishing-gradient-at-init: with fresh weights, the gradient is lost on its way back to the first layers.

What it does:
    Takes the norm of the gradient with respect to the output of each layer with weights, from the loss backwards. It
    holds where that falls below 3e-6 of its largest value and stays there, in three layers or more, for every
    initialisation, while the signal itself does not vanish.

Why it matters:
    The first layers keep their random weights while the last ones learn to do without them.

Use instead:
    Activation functions that do not saturate, a normalisation after each layer, or residual connections.

Known limits:
    Layers are taken in the order in which they ran. Gradients that are exactly 0 behind a layer that begins at zero
    do not count: training removes them.
"""

from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.records.init_audit import InitAudit
from nanhunt.rules.init_examples import chain
from nanhunt.rules.nh711_vanishing_signal_at_init import falls
from nanhunt.rules.nh715_dead_units_at_init import most_dead
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    changes = audit.gradient_falls
    if not audit.is_finite or not audit.has_finite_gradients or not falls(changes):
        return None
    if (audit.input_varies and falls(audit.signal_falls)) or most_dead(audit) is not None:
        return None
    least = max(changes)
    first = audit.weighted[0]
    spread = first.gradient_norm
    return Judgement(
        f"the gradient falls by {1 / max(least.factor, 1e-300):.1e} from the loss to {first.name or first.kind},"
        f" in {least.num_layers} of {len(audit.weighted)} layers",
        evidence={
            "fall_min_over_inits": least.factor,
            **({"first_gradient_norm": list(spread)} if spread is not None else {}),
        },
        help=("look for saturated activations, and normalise between the layers",),
        location=Location("backward", module=first.name),
    )


RULE = Rule("NH713", "vanishing-gradient-at-init", "vanishing-gradient-at-init", _judge, judges=InitAudit)


FLAGGED = (chain(0.1), chain(0.01))
CLEAN = (chain(1.0), chain(0.4), chain(0.01, forward=0.01), replace(chain(0.01), has_backward=False))
