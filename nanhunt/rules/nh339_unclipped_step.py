"""unclipped-step: nothing clips the gradients, and one step moves the weights by more than they are.

What it does:
    Takes one step on copies, with the gradients of a batch and at the highest planned rate. It holds where no clipping
    is known, the update grows with the gradient, as that of SGD does, and the change has a larger norm than the
    weights of the group.

Why it matters:
    After such a step the weights are what the last gradient was. The next gradient is often larger still, and a few
    steps later an operation overflows.

Use instead:
    ``torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`` between backward and step (behind ``unscale_`` where a
    loss is scaled), a warm-up, or a lower rate.

Known limits:
    Optimizers that divide by the size of the gradient, such as Adam, are left out: their step has the size of the rate
    whatever the gradient is. Clipping bounds a large gradient; it does nothing for one that is NaN or infinite.

References:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import DryRun, UpdateFacts
from nanhunt.rules.registry import Judgement, Rule

_MOST = 1.0


def _judge(run: DryRun) -> tuple[Judgement | Skip, ...] | Skip | None:
    if run.max_norm is not None:
        return None
    if run.gradients != "of a batch":
        return Skip("", "the size of a step needs the gradients of a batch")
    large = [update for update in run.updates if update.depends_on_size and (update.moved_by or 0.0) > _MOST]
    return tuple(_of(update, run) for update in large) or None


def _of(update: UpdateFacts, run: DryRun) -> Judgement:
    assert update.moved_by is not None
    unknown = () if run.says_clipping else ("nobody says whether the loop clips (max_grad_norm)",)
    return Judgement(
        f"a step without clipping moves the weights of group {update.group} by {update.moved_by:.3g} times their norm",
        evidence={"moved_by": update.moved_by, "lr": update.lr, "num_parameters": update.num_parameters},
        notes=(*unknown, "clipping bounds a large gradient; it does nothing for one that is NaN or infinite"),
        help=("clip by total norm before the step, or lower the rate",),
        location=Location("optimizer"),
    )


RULE = Rule("NH339", "unclipped-step", "unclipped-step", _judge, DryRun, "warning")


def _moved(share: float | None, *, sized: bool = True, max_norm: float | None = None) -> DryRun:
    update = UpdateFacts(0, "float32", 0.1, 4, 100, depends_on_size=sized, moved_by=share)
    return DryRun("of a batch", "the highest planned rate", (update,), max_norm)


FLAGGED = (_moved(3.0), _moved(1e9))
CLEAN = (_moved(0.2), _moved(None), _moved(3.0, sized=False), _moved(3.0, max_norm=1.0))
