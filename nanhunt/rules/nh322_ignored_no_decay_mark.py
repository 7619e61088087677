"""ignored-no-decay-mark: a parameter asks to be spared from weight decay, and is not.

What it does:
    Lists trainable parameters that carry ``_no_weight_decay = True`` or ``_optim = {"weight_decay": 0.0}`` and are in
    a group with weight decay.

Why it matters:
    The author of the module marked them: ``A_log``, ``D`` and ``dt_bias`` of a state-space layer set time constants,
    and decay pulls all of them to the same one. torch's optimizers do not read the mark, the training script has to.
    It changes what is learned, and does not by itself make a value non-finite.

Use instead:
    Collect the marked parameters in a group with ``weight_decay=0.0``.

Known limits:
    The mark is an attribute of the tensor, and is lost where the parameter is replaced by a copy.

References:
    Gu and Dao, Mamba, arXiv:2312.00752.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    found = [one for one in setup.decayed() if one.asks_no_decay]
    if not found:
        return None
    decay = max(setup.decay_of(one) for one in found)
    return Judgement(
        f"weight decay of {decay:g} acts on {count(len(found), 'parameter')} marked to be spared from it",
        evidence={"num_marked": len(found), "first": some([one.name for one in found])},
        notes=setup.decay_notes(found),
        help=("put parameters with _no_weight_decay into a group with weight_decay=0.0",),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH322", "ignored-no-decay-mark", "ignored-no-decay-mark", _judge, OptimizerSetup, "warning")

_GROUPS = (GroupFacts(0, 1e-4, 0.05, decay="direct", kept_share=0.951), GroupFacts(1, 1e-4))


def _setup(group: int, *, marked: bool) -> OptimizerSetup:
    rate = ParameterFacts("mixer.A_log", "Mamba2", "1-d", shape=(4,), groups=(group,), asks_no_decay=marked)
    return OptimizerSetup("AdamW", _GROUPS, (rate,))


FLAGGED = (_setup(0, marked=True),)
CLEAN = (_setup(1, marked=True), _setup(0, marked=False))
