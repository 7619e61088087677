"""``nanhunt audit-optimizer``: parameter groups, schedule, clipping and state, without changing any of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.audit.optimizer_copies import innermost
from nanhunt.audit.optimizer_examination import Examination
from nanhunt.audit.optimizer_given import Given
from nanhunt.audit.optimizer_state import groups_in_file, state_in_file, steps_text, stored_weights
from nanhunt.audit.report import report_of
from nanhunt.audit.subject import Subject
from nanhunt.capture.checkpoint import Stored
from nanhunt.capture.rng import set_rng_state
from nanhunt.errors import CaptureError, NanhuntError, TargetError, first_line
from nanhunt.findings import Report, Skip
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupSettings
from nanhunt.targets import Target

Progress = Callable[[str], None]

_TITLE = "audit of the optimizer"


def audit_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: Any = None,
    batch: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    max_grad_norm: float | None = None,
    num_steps: int | None = None,
    warmup_steps: int | None = None,
    scaler: Any = None,
    others: Sequence[Optimizer] = (),
) -> Report:
    """What is wrong with an optimizer, its groups, its schedule and its state.

    Steps are taken on copies only: model, optimizer, schedule, gradients and random generators stay as they are.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer.
        scheduler: Its learning-rate schedule, not stepped yet or under way.
        batch: A batch for one step on a copy of the model.
        loss: Gives the loss of a model and that batch, ().
        max_grad_norm: Total norm that the loop clips to; None if nobody knows.
        num_steps: Planned optimizer steps; None for the schedule's length, else 10,000.
        warmup_steps: How long the warm-up is meant to be, in steps.
        scaler: The loop's ``GradScaler``, to be looked at between backward and step.
        others: Optimizers that hold other parameters of the model, as in adversarial training or beside Muon; they are
            not audited themselves.

    Returns:
        The report.

    Raises:
        NanhuntError: If a batch comes without a loss or a loss uses another model than its own, if there are no
            parameter groups, or if a number is out of its range.
    """
    if batch is not None and loss is None:
        raise NanhuntError("a batch needs a loss", help="pass loss=lambda model, batch: ...")
    given = Given(
        title=_TITLE,
        model=model,
        optimizer=innermost(optimizer),
        scheduler=scheduler,
        batch=batch,
        loss=loss,
        max_grad_norm=max_grad_norm,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        scaler=scaler,
        others=tuple(innermost(other) for other in others),
    )
    given.check()
    return Examination(given).report()


def audit_subject(subject: Subject, progress: Progress) -> Report:
    """The audit of what a command line names.

    Raises:
        NanhuntError: If there is neither an optimizer nor its stored state.
    """
    _check_groups(subject.stored)
    if subject.target is None:
        return _audit_file(subject)
    progress("building the model")
    model = subject.model()
    optimizer = innermost(subject.optimizer(model))
    source, target = subject.target.source, subject.target
    given = Given(
        title=f"{_TITLE} of {subject.name}",
        model=model,
        optimizer=optimizer,
        scheduler=_scheduler_of(target, optimizer),
        loss=_loss_of(subject) if target.has_loss else None,
        max_grad_norm=target.max_grad_norm,
        says_clipping=hasattr(source, "max_grad_norm"),
        num_steps=getattr(source, "num_steps", None),
        warmup_steps=getattr(source, "warmup_steps", None),
        stored=subject.stored,
    )
    given.check(f"target {target.name}: ")
    if target.has_loss:
        progress("making a batch")
        given.batch = subject.batch()
    return Examination(given, progress).report()


def _check_groups(stored: Stored | None) -> None:
    """Refuses a file whose groups are no groups."""
    if stored is None or stored.optimizer is None:
        return
    groups = stored.optimizer.get("param_groups", [])
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise CaptureError(f"{stored.path}: the optimizer's param_groups are not a list of groups")


def _scheduler_of(target: Target, optimizer: Optimizer) -> Any:
    make = getattr(target.source, "scheduler", None)
    try:
        return make(optimizer) if make is not None else None
    except NanhuntError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise TargetError(f"target {target.name} gives no scheduler: {reason}") from error


def _loss_of(subject: Subject) -> Callable[[nn.Module, Any], Tensor]:
    """The target's loss; that of a captured batch draws the random numbers of the captured step."""
    target, capture = subject.target, subject.stored.capture if subject.stored is not None else None
    assert target is not None
    random = capture.payload.get("rng") if capture is not None and capture.batches else None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if random:
            set_rng_state(random)
        return target.loss(model, batch)

    return loss


def _audit_file(subject: Subject) -> Report:
    """A file without its model: the groups' numbers and the state."""
    stored = subject.stored
    assert stored is not None
    if stored.optimizer is None and stored.weights is None:
        raise NanhuntError(f"{stored.path} holds neither weights nor an optimizer", help="give --target")
    started = time.perf_counter()
    no_target = "the file does not say what the model is; give --target module:attribute"
    skips = [Skip("parameter groups against the model's modules", no_target), Skip("a step on copies", no_target)]
    if stored.optimizer is None:
        skips.append(Skip("the optimizer's state", f"{stored.path.name} holds no optimizer"))
    if stored.scheduler is not None:
        skips.append(Skip("the schedule's curve", "its state alone does not say what schedule it is"))
    facts: list[tuple[str, str]] = []
    records: list[Any] = []
    if stored.weights is not None:
        facts.append(("weights", count(len(stored.weights), "tensor")))
        records.append(stored_weights(stored.weights))
    if stored.optimizer is not None:
        groups = groups_in_file(stored.optimizer)
        state = state_in_file(stored.optimizer, layout=None, step=stored.step)
        held = f"state of {count(state.num_with_state, 'parameter')}"
        facts.append(("optimizer", f"{count(len(groups), 'group')}, {held}{steps_text(state)}"))
        records += [GroupSettings("the optimizer", groups), state]
    if stored.step is not None:
        facts.append(("step", f"{stored.step:,}"))
    seconds = time.perf_counter() - started
    return report_of(f"{_TITLE} of {subject.name}", records, facts=facts, skips=skips, seconds=seconds)
