"""blocked-gradient-at-init: weights that are 0 have no gradient, and a few steps of training do not give them one.

What it does:
    Looks at parameters of two axes or more that are all 0. Where their gradient is 0 as well, the model is trained for
    three steps (on a copy) and looked at again. It holds where parameter and gradient are still 0, for every
    initialisation, and there is a gradient once these parameters are not 0.

Why it matters:
    One layer that begins at zero is fine: its own gradient is not 0, so it moves and lets the others learn. Two in a
    row hold each other at zero for good: the first has no gradient because of the second, the second no input because
    of the first.

Use instead:
    Let the last layer of a branch begin at zero, and only that.

Known limits:
    Parameters of one axis, as biases and gates, are not looked at.

References:
    Zhang et al. 2019, arXiv:1901.09321 (zero last layers). Hu et al. 2021, arXiv:2106.09685 (one zero factor of two).
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.init_audit import InitAudit, ParameterAtInit
from nanhunt.rules.registry import Judgement, Rule


def _judge(audit: InitAudit) -> Judgement | None:
    blocked = [parameter.name for parameter in audit.parameters if parameter.still_blocked]
    if not blocked or not audit.is_finite:
        return None
    more = f" and {len(blocked) - 2} more" if len(blocked) > 2 else ""
    return Judgement(
        f"{' and '.join(blocked[:2])}{more}: weights and gradient 0, also after training a little",
        evidence={"num_parameters": len(blocked)},
        notes=(f"{count(len(blocked), 'matrix', 'matrices')} of zeros with no gradient on {audit.num_inits} builds",),
        help=("let only the last of several layers in a row begin at zero",),
        location=Location("weights", tensor=blocked[0]),
    )


RULE = Rule("NH718", "blocked-gradient-at-init", "blocked-gradient-at-init", _judge, judges=InitAudit)

FLAGGED = (InitAudit(1, parameters=(ParameterAtInit("up.weight", (4, 4), (0.0,), is_zero=True, still_blocked=True),)),)
CLEAN = (
    InitAudit(1, parameters=(ParameterAtInit("head.weight", (4, 4), (1.0,), is_zero=True),)),
    InitAudit(1, parameters=(ParameterAtInit("gate.weight", (4, 4), (0.0,), is_zero=True),)),
)
