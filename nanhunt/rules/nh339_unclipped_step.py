"""unclipped-step: nothing clips the gradients, and one step moves the weights by more than they are.

What it does:
    Takes one step on copies, with the gradients of a batch and at the highest planned rate. It holds where no clipping
    is known, the update grows with the gradient, as that of SGD does, and the change of all weights together has a
    larger norm than all weights together.

Why it matters:
    After such a step the weights are what the last gradient was. The next gradient is often larger still, and a few
    steps later an operation overflows.

Use instead:
    ``torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`` between backward and step (behind ``unscale_`` where a
    loss is scaled), a warm-up, or a lower rate.

Known limits:
    Optimizers that divide by the size of the gradient, such as Adam, are left out: their step has the size of the rate
    whatever the gradient is. A small group, such as biases near 0, does not count by itself. Clipping bounds a large
    gradient; it does nothing for one that is NaN or infinite.

References:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

import math

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import DryRun, UpdateFacts
from nanhunt.rules.registry import Judgement, Rule

_MOST = 1.0


def _judge(run: DryRun) -> Judgement | Skip | None:
    if run.max_norm is not None:
        return None
    if run.gradients != "of a batch":
        return Skip("", "the size of a step needs the gradients of a batch")
    share = run.moved_by
    if share is None or share <= _MOST or not any(update.depends_on_size for update in run.updates):
        return None
    unknown = () if run.says_clipping else ("nobody says whether the loop clips (max_grad_norm)",)
    return Judgement(
        f"a step without clipping moves the weights by {share:.3g} times their norm",
        evidence={
            "moved_by": share,
            "lr": max(update.lr for update in run.updates),
            "num_parameters": sum(update.num_parameters for update in run.updates),
        },
        notes=(*unknown, "clipping bounds a large gradient; it does nothing for one that is NaN or infinite"),
        help=("clip by total norm before the step, or lower the rate",),
        location=Location("optimizer"),
    )


RULE = Rule("NH339", "unclipped-step", "unclipped-step", _judge, DryRun, "warning")


def _moved(share: float, *, weight_norm: float = 1.0, sized: bool = True, max_norm: float | None = None) -> DryRun:
    update = UpdateFacts(
        0, "float32", 0.1, 4, 100, depends_on_size=sized, change_norm=share * weight_norm, weight_norm=weight_norm
    )
    body = UpdateFacts(1, "float32", 0.1, 4, 100, depends_on_size=sized, weight_norm=0.1)
    return DryRun("of a batch", "the highest planned rate", (update, body), max_norm)


FLAGGED = (_moved(3.0), _moved(1e9))
CLEAN = (
    _moved(0.2),
    _moved(math.nan),
    _moved(300.0, weight_norm=1e-4),
    _moved(3.0, sized=False),
    _moved(3.0, max_norm=1.0),
)
