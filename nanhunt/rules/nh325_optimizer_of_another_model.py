"""optimizer-of-another-model: the optimizer holds none of the model's trainable parameters.

What it does:
    Compares the tensors in the groups with the model's parameters, by identity. It holds where none of the trainable
    ones is held and the optimizer holds others.

Why it matters:
    The optimizer moves tensors that the model does not use, and the model stands still. So it is after the model was
    built again, copied, or moved in a way that replaces its parameters, once the optimizer had been made.

Use instead:
    Make the optimizer last: after the model is loaded, moved, cast, wrapped and compiled.

Known limits:
    An optimizer with float32 master copies of half-precision weights looks the same; there the rule says that it cannot
    judge.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | Skip | None:
    trainable = [one for one in setup.parameters if one.requires_grad]
    if not trainable or not setup.foreign or any(one.groups for one in trainable):
        return None
    if {one.dtype for one in setup.foreign} == {"float32"} and {one.dtype for one in trainable} <= {
        "float16",
        "bfloat16",
    }:
        return Skip("the groups", "the optimizer holds float32 tensors, which may be master copies of the weights")
    return Judgement(
        f"the optimizer holds {count(len(setup.foreign), 'tensor')}, none of which is one of the model's"
        f" {count(len(trainable), 'trainable parameter')}",
        evidence={"num_held": len(setup.foreign), "num_trainable": len(trainable)},
        help=("make the optimizer after the model is loaded, moved, cast and wrapped",),
        location=Location("optimizer"),
    )


RULE = Rule("NH325", "optimizer-of-another-model", "optimizer-of-another-model", _judge, OptimizerSetup)

_GROUPS = (GroupFacts(0, 1e-4),)
_STRANGER = ParameterFacts("", groups=(0,))


def _setup(*groups: int, dtype: str = "float32") -> OptimizerSetup:
    own = ParameterFacts("head.weight", "Linear", dtype=dtype, groups=groups)
    return OptimizerSetup("AdamW", _GROUPS, (own,), (_STRANGER,))


FLAGGED = (_setup(), _setup(dtype="float64"))
CLEAN = (_setup(0), OptimizerSetup("AdamW", _GROUPS, (ParameterFacts("head.weight", groups=(0,)),)))
