"""unoptimized-parameter: a trainable parameter is in no group of the optimizer.

What it does:
    Lists parameters with ``requires_grad`` that the optimizer does not hold, unless a step with a batch has shown that
    they get no gradient.

Why it matters:
    They never learn. ``optimizer.zero_grad()`` does not reach them, so their gradients accumulate for ever; and
    ``clip_grad_norm_(model.parameters())`` counts those in, so that every other gradient is scaled down more and more.

Use instead:
    Give them to the optimizer, or freeze them with ``requires_grad_(False)``. A part that was added after the optimizer
    was made needs ``optimizer.add_param_group``.

Known limits:
    Another optimizer may hold them; audit that one too.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    trainable = [one for one in setup.parameters if one.requires_grad]
    found = [one for one in trainable if not one.groups and one.has_gradient is not False]
    if not found or all(not one.groups for one in trainable):
        # An optimizer that holds none of them is not this model's, which is another rule.
        return None
    known = sum(one.has_gradient is True for one in found)
    seen = (f"{count(known, 'of them has', 'of them have')} a gradient",) if known else ()
    return Judgement(
        f"{count(len(found), 'trainable parameter is', 'trainable parameters are')} in no group of the optimizer",
        evidence={
            "num_missing": len(found),
            "num_trainable": len(trainable),
            "first": some([one.name for one in found]),
        },
        notes=(
            *seen,
            "optimizer.zero_grad() leaves their gradients alone: unless another one clears them, they add up",
        ),
        help=("give them to the optimizer, or freeze them with requires_grad_(False)",),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH323", "unoptimized-parameter", "unoptimized-parameter", _judge, OptimizerSetup, "warning")

_GROUPS = (GroupFacts(0, 1e-4),)
_HELD = ParameterFacts("body.weight", "Linear", groups=(0,))


def _setup(*, requires_grad: bool = True, has_gradient: bool | None = None) -> OptimizerSetup:
    other = ParameterFacts("head.weight", "Linear", requires_grad=requires_grad, has_gradient=has_gradient)
    return OptimizerSetup("AdamW", _GROUPS, (_HELD, other))


FLAGGED = (_setup(), _setup(has_gradient=True))
CLEAN = (_setup(requires_grad=False), _setup(has_gradient=False), OptimizerSetup("AdamW", _GROUPS, (_HELD,)))
