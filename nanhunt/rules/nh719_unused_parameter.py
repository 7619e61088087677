"""unused-parameter: the loss does not depend on a parameter that is to be trained.

What it does:
    Looks for parameters with ``requires_grad`` that the backward pass never comes to, for any initialisation.

Why it matters:
    A layer that is built and not called, or whose output is detached or thrown away, stays as it was drawn; weight
    decay may still move it. ``DistributedDataParallel`` stops with an error unless it is told to look for such
    parameters.

Use instead:
    Remove the layer, or set ``requires_grad=False`` where it is kept for another task.

Known limits:
    One batch is run: an expert that no sample is sent to, or a branch that this batch does not take, is unused here
    and not in general. Where no loss was given and a projection of the outputs stands in, an output that your loss
    does use may be missing from it.
"""

from dataclasses import replace

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.init_audit import InitAudit, ParameterAtInit
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    unused = [one.name for one in audit.parameters if all(norm is None for norm in one.gradient_norms)]
    if not audit.has_backward or not unused or len(unused) == len(audit.parameters):
        return None
    more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    return Judgement(
        f"the backward pass does not come to {count(len(unused), 'parameter')} of {len(audit.parameters)}:"
        f" {', '.join(unused[:3])}{more}",
        evidence={"num_unused": len(unused), "num_parameters": len(audit.parameters)},
        help=("call the layer, remove it, or set requires_grad=False",),
        location=Location("backward", tensor=unused[0]),
    )


RULE = Rule("NH719", "unused-parameter", "unused-parameter", _judge, judges=InitAudit, severity="warning")

_USED = ParameterAtInit("head.weight", (2, 4), (1.0, 0.0))
_UNUSED = ParameterAtInit("pooler.weight", (4, 4), (None, None))
FLAGGED = (InitAudit(2, parameters=(_USED, _UNUSED)),)
CLEAN = (
    InitAudit(2, parameters=(_USED,)),
    InitAudit(2, parameters=(_USED, replace(_UNUSED, gradient_norms=(None, 1.0)))),
    InitAudit(2, parameters=(_USED, _UNUSED), has_backward=False),
)
