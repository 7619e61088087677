"""non-finite-hyperparameter: a learning rate, beta or another number of an optimizer was NaN or infinite.

What it does:
    Looks at the numbers of the parameter group of the first weight that the step spoilt.

Why it matters:
    The optimizer multiplies every weight of the group by it. Gradients and loss are innocent, and a schedule is asked
    once per step: a table with a gap, a division by the number of steps, or a warm-up from 0 is enough.

Use instead:
    Look at what computes it: the schedule, a table of rates, an adaptive rule of your own.
"""

import math

from nanhunt.rules.optimizer_words import example, spoilt
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    for element in spoilt(case):
        bad = {name: value for name, value in element.settings.items() if not math.isfinite(value)}
        if bad and element.gradient is not None and math.isfinite(element.gradient):
            told = " and ".join(f"{name} is {value:g}" for name, value in bad.items())
            return Judgement(
                f"{told} in group {element.group} of {element.optimizer}, which holds {element.parameter}",
                evidence={**bad, "group": element.group, "gradient": element.gradient},
                notes=("the gradient there is finite",),
                help=("look at what computes it: the schedule, a table, a rule of your own",),
            )
    return None


RULE = Rule("NH308", "non-finite-hyperparameter", "non-finite-hyperparameter", _judge, goes_before=("NH103", "NH117"))

FLAGGED = (
    example("aten::add_", optimizer="SGD", settings={"lr": float("inf")}, state={}, group=1),
    example("aten::_foreach_lerp_", settings={"lr": 1e-3, "betas[0]": float("nan")}),
)
CLEAN = (
    example(),
    example(settings={"lr": float("inf")}, gradient=float("nan")),
    example(settings={"lr": float("inf")}, step=1),
)
