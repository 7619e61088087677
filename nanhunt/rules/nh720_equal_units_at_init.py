"""equal-units-at-init: all units of a layer begin with the same weights and are given the same gradient.

What it does:
    Looks at the weights of ``nn.Linear`` and of convolutions with one group. It holds where all rows are the same,
    not zero, and their gradients are the same as well, for every initialisation.

Why it matters:
    Units that begin alike and are moved alike stay alike: the layer has as many units as ever and works like one.

Use instead:
    Random weights; a constant only for biases and for the gains of normalisations.

Known limits:
    Equal rows whose gradients differ, because random weights follow or because each is a class of its own, are no
    fault: the first step tells them apart.
"""

from nanhunt.findings import Location
from nanhunt.records.init_audit import InitAudit, ParameterAtInit
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    equal = [parameter for parameter in audit.parameters if parameter.has_equal_units]
    if not equal or not audit.is_finite:
        return None
    first = equal[0]
    return Judgement(
        f"all {first.shape[0]:,} units of {first.name} have the same weights and the same gradient",
        evidence={"num_layers": len(equal), "shape": list(first.shape)},
        help=("draw the weights at random",),
        location=Location("weights", tensor=first.name),
    )


RULE = Rule("NH720", "equal-units-at-init", "equal-units-at-init", _judge, judges=InitAudit)

FLAGGED = (InitAudit(1, parameters=(ParameterAtInit("fc.weight", (32, 8), (0.5,), has_equal_units=True),)),)
CLEAN = (InitAudit(1, parameters=(ParameterAtInit("fc.weight", (32, 8), (0.5,)),)), InitAudit(3))
