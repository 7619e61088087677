"""non-finite-at-init: fresh weights, what the model makes of them, or their gradients hold NaN or infinity.

What it does:
    Counts non-finite elements of every trainable parameter of a freshly built model, and of the outputs of its layers
    on one batch; then looks at the gradients with respect to these outputs. Unlike the other rules for fresh weights
    it holds if one initialisation of several is like this.

Why it matters:
    Training begins with what no step can mend. Usual reasons are ``torch.empty`` that nobody fills, and weights so
    large that the first forward pass overflows. A gradient that is not finite for some seeds, with a finite loss, is a
    step that will be met in training: a root at 0, eigenvectors at a tie.

Use instead:
    Fill every parameter in ``__init__`` or ``reset_parameters``; look for ``torch.empty``.

Known limits:
    Uninitialised memory often holds finite numbers; three builds may all miss it. Where the batch is not finite
    itself, the outputs say so here as well; ``nanhunt audit-data`` tells the two apart.
"""

import math

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.init_audit import InitAudit, LayerAtInit, LayerPass, ParameterAtInit
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    broken = [parameter for parameter in audit.parameters if parameter.num_nonfinite]
    if broken:
        first = broken[0]
        return Judgement(
            f"{first.name} holds {count(first.num_nonfinite, 'non-finite element')} before training",
            evidence={"num_parameters": len(broken), "shape": list(first.shape)},
            help=("fill it where the model is built; torch.empty leaves what was in memory",),
            location=Location("weights", tensor=first.name),
        )
    layers = [layer for layer in audit.layers if any(one.num_nonfinite for one in layer.passes)]
    if not layers:
        return _judge_gradients(audit)
    first_layer = layers[0]
    number = max(one.num_nonfinite for one in first_layer.passes)
    return Judgement(
        f"{first_layer.name} gives {count(number, 'non-finite element')} on fresh, finite weights",
        evidence={"num_layers": len(layers)},
        help=("nanhunt replay of such a step, or nanhunt.trace around it, names the operation",),
        location=Location("forward", module=first_layer.name),
    )


def _judge_gradients(audit: InitAudit) -> Judgement | None:
    # The last to run is the first that the backward pass comes to.
    broken = [layer for layer in reversed(audit.layers) if layer.num_nonfinite_gradients]
    if not broken:
        return None
    first = broken[0]
    number = first.num_nonfinite_gradients
    return Judgement(
        f"the gradient at {first.name or first.kind} is not finite in {number} of"
        f" {count(audit.num_inits, 'initialisation')}, though the output is",
        evidence={"num_layers": len(broken), "num_inits": number},
        notes=(f"the backward pass comes to {first.name or first.kind} first of {count(len(broken), 'such layer')}",),
        help=("nanhunt.trace around such a step names the operation",),
        location=Location("backward", module=first.name),
    )


RULE = Rule("NH710", "non-finite-at-init", "non-finite-at-init", _judge, judges=InitAudit)

_LAYER = LayerAtInit("head", "Linear", (LayerPass(1.0, 1.0, 1.0, 1.0, num_nonfinite=3),))
_PASSES = (LayerPass(1.0, 1.0, 1.0, 1.0), LayerPass(1.0, 1.0, 1.0, math.nan))
_BACKWARD = LayerAtInit("encoder", "Linear", _PASSES)
FLAGGED = (
    InitAudit(1, parameters=(ParameterAtInit("gate", (4, 4), (1.0,), num_nonfinite=16),)),
    InitAudit(1, layers=(_LAYER,)),
    InitAudit(2, layers=(_BACKWARD,)),
)
CLEAN = (InitAudit(1, parameters=(ParameterAtInit("gate", (4, 4), (1.0,)),)), InitAudit(3))
