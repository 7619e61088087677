"""parameter-held-twice: a parameter is in the optimizer's groups more than once.

What it does:
    Counts how often each parameter stands in the groups. A weight that two modules share counts once.

Why it matters:
    One ``optimizer.step()`` updates it as often as it is held, with one state: the moments and the step count advance
    twice, and in fused and foreach implementations both updates may read the same old value.

Use instead:
    Build the groups from ``model.parameters()``, which names shared weights once, and by ``id``.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    found = [one for one in (*setup.parameters, *setup.foreign) if len(one.groups) > 1]
    if not found:
        return None
    first = found[0]
    return Judgement(
        f"{count(len(found), 'parameter is', 'parameters are')} in the groups more than once, so one step moves them"
        f" up to {max(len(one.groups) for one in found)} times",
        evidence={"num_repeated": len(found), "first": some([one.name for one in found]), "groups": list(first.groups)},
        help=("put each parameter into one group, once",),
        location=Location("optimizer", tensor=first.name),
    )


RULE = Rule("NH324", "parameter-held-twice", "parameter-held-twice", _judge, OptimizerSetup)

_GROUPS = (GroupFacts(0, 1e-4), GroupFacts(1, 1e-3))


def _setup(*groups: int) -> OptimizerSetup:
    return OptimizerSetup("AdamW", _GROUPS, (ParameterFacts("head.weight", "Linear", groups=groups),))


FLAGGED = (_setup(0, 1), _setup(0, 0))
CLEAN = (_setup(0), _setup())
