"""unoptimized-parameter: a trainable parameter is in no group of the optimizer.

What it does:
    Lists parameters with ``requires_grad`` that none of the optimizers that were given holds, unless a step with a
    batch has shown that they get no gradient.

Why it matters:
    They never learn. ``optimizer.zero_grad()`` does not reach them, so their gradients accumulate for ever; and
    ``clip_grad_norm_(model.parameters())`` counts those in, so that every other gradient is scaled down more and more.

Use instead:
    Give them to the optimizer, or freeze them with ``requires_grad_(False)``. A part that was added after the optimizer
    was made needs ``optimizer.add_param_group``.

Known limits:
    Another optimizer may hold them, as in adversarial training or beside Muon: give it as ``others=[...]``.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    trainable = [one for one in setup.parameters if one.requires_grad]
    found = [one for one in trainable if not (one.groups or one.held_elsewhere or one.has_gradient is False)]
    if not found or all(not one.groups for one in trainable):
        # An optimizer that holds none of them is not this model's, which is another rule.
        return None
    known = sum(one.has_gradient is True for one in found)
    seen = (f"{count(known, 'of them has', 'of them have')} a gradient",) if known else ()
    those = (
        f"none of the {setup.num_optimizers} optimizers" if setup.num_optimizers > 1 else "no group of the optimizer"
    )
    return Judgement(
        f"{count(len(found), 'trainable parameter is', 'trainable parameters are')} in {those} that"
        f" {'were' if setup.num_optimizers > 1 else 'was'} given",
        evidence={
            "num_missing": len(found),
            "num_trainable": len(trainable),
            "first": some([one.name for one in found]),
        },
        notes=(
            *seen,
            "optimizer.zero_grad() leaves their gradients alone: unless another one clears them, they add up",
        ),
        help=(
            "give them to the optimizer, or freeze them with requires_grad_(False)",
            "name further optimizers with others=[...]",
        ),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH323", "unoptimized-parameter", "unoptimized-parameter", _judge, OptimizerSetup, "warning")

_GROUPS = (GroupFacts(0, 1e-4),)
_HELD = ParameterFacts("body.weight", "Linear", groups=(0,))


def _setup(
    *, requires_grad: bool = True, has_gradient: bool | None = None, is_elsewhere: bool = False
) -> OptimizerSetup:
    other = ParameterFacts(
        *("head.weight", "Linear"),
        requires_grad=requires_grad,
        has_gradient=has_gradient,
        held_elsewhere=is_elsewhere,
    )
    return OptimizerSetup("AdamW", _GROUPS, (_HELD, other))


FLAGGED = (_setup(), _setup(has_gradient=True))
CLEAN = (
    _setup(requires_grad=False),
    _setup(has_gradient=False),
    _setup(is_elsewhere=True),
    OptimizerSetup("AdamW", _GROUPS, (_HELD,)),
)
