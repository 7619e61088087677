"""frozen-parameter-in-group: the optimizer holds parameters that do not require a gradient.

What it does:
    Lists parameters with ``requires_grad=False`` in the groups.

Why it matters:
    Without a gradient an optimizer passes over them, so at first nothing happens. But a gradient that is still stored
    from before they were frozen, or a zeroed one (``set_to_none=False``), lets momentum and weight decay go on moving
    them.

Use instead:
    Give the optimizer ``[p for p in model.parameters() if p.requires_grad]``, and clear gradients when freezing.

Known limits:
    Parameters that are frozen for a while on purpose are listed as well.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    found = [one for one in setup.parameters if one.groups and not one.requires_grad]
    if not found:
        return None
    moving = [one.name for one in found if one.has_gradient]
    what = (
        f"{count(len(moving), 'of them has', 'of them have')} a stored gradient, and a step moves what has one unless"
        f" zero_grad() clears it first: {some(moving)}"
        if moving
        else "none of them has a stored gradient, so a step passes over them"
    )
    return Judgement(
        f"{count(len(found), 'frozen parameter is', 'frozen parameters are')} in the optimizer's groups",
        evidence={
            "num_frozen": len(found),
            "num_with_gradient": len(moving),
            "first": some([one.name for one in found]),
        },
        notes=(what,),
        help=("give the optimizer trainable parameters only, and clear gradients when freezing",),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH326", "frozen-parameter-in-group", "frozen-parameter-in-group", _judge, OptimizerSetup, "warning")

_GROUPS = (GroupFacts(0, 1e-4),)


def _setup(*groups: int, requires_grad: bool = False, has_gradient: bool | None = None) -> OptimizerSetup:
    one = ParameterFacts("base.weight", "Linear", "matrix", "", (4, 4), "float32", requires_grad, groups, has_gradient)
    return OptimizerSetup("AdamW", _GROUPS, (one,))


FLAGGED = (_setup(0), _setup(0, has_gradient=True))
CLEAN = (_setup(), _setup(0, requires_grad=True))
