"""``nanhunt audit-dtype``: one step, forward and backward, with its types and what they cost against float64.

NOTE on what is as before when the audit returns: parameters, buffers, gradients, training flags, the batch and all
random generators. The step runs on the model itself, without an optimizer step, and writes to copies of its buffers;
what a forward keeps in other attributes is not put back.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nanhunt.audit.dtype_probe import DtypeProbe
from nanhunt.audit.dtype_tables import tables
from nanhunt.audit.report import NOTHING, report_of
from nanhunt.audit.shadow import is_number, name_of
from nanhunt.audit.subject import Subject, find_subject
from nanhunt.capture.format import tensor_paths
from nanhunt.capture.put_back import put_back
from nanhunt.errors import NanhuntError, TargetError, first_line
from nanhunt.findings import Report, Skip
from nanhunt.numerics import count
from nanhunt.observe.modes import untraced
from nanhunt.observe.source import USERS, kind_of, source_line
from nanhunt.records.dtype_audit import DtypeAudit, LinalgInput, OpPlace, Root
from nanhunt.records.ops import SourceLine

Progress = Callable[[str], None]
Loss = Callable[[Any, Any], Any]

# What torch says before an operation runs at all, so that the probe never sees it.
_REFUSES_HALF = re.compile(
    r"(?P<op>linalg[._][a-z_]+|\w*(?:eigh?|svd|cholesky|solve|inverse|qr|lu)\w*).*\b(?P<dtype>Half|BFloat16)\b"
)
_TYPES = {"Half": "float16", "BFloat16": "bfloat16"}
_NO_LOSS = "none given: that of the outputs, else their sum"


@dataclass
class _Way:
    """Where the backward pass begins: at the loss, or at outputs with a gradient for each."""

    roots: list[Any]
    gradients: list[Tensor] | None = None

    def back(self) -> None:
        """Runs it, as far as anything has a gradient."""
        gradients: list[Any] = self.gradients or [None] * len(self.roots)
        pairs = [(root, grad) for root, grad in zip(self.roots, gradients, strict=True) if root.requires_grad]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])


Run = Callable[[nn.Module, Any], _Way]


@dataclass
class _Step:
    """What is run.

    Attributes:
        name: For the report's title.
        model: The model itself.
        run: Gives what to go backward from, and with which gradients, of the batch.
        batch: What it runs on.
        loss: Where the loss comes from, in words.
        autocast: Device and type of the region to run in; empty for none.
        rng: States of the random generators to begin with; None for those of now.
    """

    name: str
    model: nn.Module
    run: Run
    batch: Any
    loss: str
    autocast: dict[str, str] = field(default_factory=dict)
    rng: dict[str, Any] | None = None


def audit_dtype(target: Any, batch: Any = None, *, loss: Loss | None = None, seed: int = 0) -> Report:
    """Runs one step, and reports where types change and what that costs against float64.

    Parameters, buffers, gradients, the batch and the random generators are as before when it returns.

    Args:
        target: A module; or a target, or the name of one, whose model is built for the audit.
        batch: What the model is called with: one tensor, a tuple of arguments or a dictionary of keyword arguments.
            Where there is a loss, anything that it can take apart. None for the batch that the target makes.
        loss: Computes the loss as ``loss(model, batch)``; None for the target's. A module without one goes backward
            from the sum of its outputs, or from the ``loss`` among them.
        seed: Seed of fresh weights and of a batch the target makes.

    Raises:
        NanhuntError: If there is no batch, or the step fails before anything runs.
        TargetError: If no target fits.
    """
    if not isinstance(target, nn.Module):
        return _audit(_step_of(find_subject(target=target, seed=seed), batch, loss), lambda what: None)
    if batch is None:
        raise NanhuntError("no batch to run the model on", help="audit_dtype(model, batch)")
    words = "given" if loss is not None else _NO_LOSS
    return _audit(_Step(type(target).__name__, target, _run_of(loss), batch, words), lambda what: None)


def audit_subject(subject: Subject, progress: Progress) -> Report:
    """The audit of what a command line gave.

    Raises:
        NanhuntError: If there is no batch.
        TargetError: If there is no target.
    """
    return _audit(_step_of(subject, None, None), progress)


def _step_of(subject: Subject, batch: Any, loss: Loss | None) -> _Step:
    model = subject.model()
    model.train()
    batch = subject.batch() if batch is None else batch
    run: Run
    capture = subject.stored.capture if subject.stored is not None else None
    target = subject.target
    assert target is not None
    if batch is None and capture is not None and capture.payload.get("calls"):
        batch = capture.payload["calls"][0]
        run, words = _run_call, "none: the captured gradients of the outputs"
    elif batch is None:
        raise NanhuntError(
            f"no batch to run {subject.name} on", help="give a capture, or a target with control_batch(seed)"
        )
    else:
        given = loss if loss is not None else target.loss if target.has_loss else None
        run, words = _run_of(given), f"of target {target.name}" if loss is None else "given"
        words = words if given is not None else _NO_LOSS
    step = _Step(subject.name, model, run, batch, words)
    if capture is not None:
        for name, module in model.named_modules():
            module.training = capture.meta.get("model", {}).get("training", {}).get(name, module.training)
        step.autocast = capture.meta.get("autocast") or {}
        step.rng = capture.payload.get("rng")
    return step


def _run_of(loss: Loss | None) -> Run:
    def run(model: nn.Module, batch: Any) -> _Way:
        if loss is not None:
            value = loss(model, batch)
            return _Way([sum(value.values()) if isinstance(value, dict) else value])
        outputs = _applied(model, batch)
        found = getattr(outputs, "loss", None)
        if isinstance(found, Tensor) and found.numel() == 1:
            return _Way([found])
        # Gradients of one are those of the sum, and no operation of ours stands among the model's.
        numbers = [leaf for leaf in tree_leaves(outputs) if is_number(leaf)]
        return _Way(numbers, [torch.ones_like(leaf) for leaf in numbers])

    return run


def _run_call(model: nn.Module, call: Any) -> _Way:
    outputs = [leaf for leaf in tree_leaves(model(*call["args"], **call["kwargs"])) if isinstance(leaf, Tensor)]
    pairs = [(outputs[int(number)], gradient) for number, gradient in call["output_grads"].items()]
    return _Way([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _applied(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _audit(step: _Step, progress: Progress) -> Report:
    started = time.perf_counter()
    progress("running one step, and its operations again in float64")
    probe = DtypeProbe(step.model)
    with put_back(step.model, step.rng):
        root, refused, ended = _run(step, probe)
    audit = probe.records(root)
    if ended and refused is None and not audit.num_ops:
        raise NanhuntError(f"the step fails before anything runs: {ended}")
    if refused is not None and not any(one.error for one in audit.linalg):
        audit = replace(audit, linalg=(*audit.linalg, refused))
    skips = probe.skips()
    facts = [*_facts(step, audit)]
    if ended:
        facts.append(("ended in", ended))
        skips.append(Skip("the rest of the step", "it ended in an error"))
    return report_of(
        f"dtype audit of {step.name}",
        [audit],
        facts=facts,
        tables=tables(audit),
        skips=skips,
        seconds=time.perf_counter() - started,
        absence=f"the step ended in an error, and until then {NOTHING}" if ended else NOTHING,
    )


def _run(step: _Step, probe: DtypeProbe) -> tuple[Root | None, LinalgInput | None, str]:
    """Runs the step; an error that it raises is a result."""
    batch = tree_map(_copied, step.batch)
    for path, tensor in tensor_paths(batch):
        probe.declare(f"batch.{path}" if path else "batch", tensor)
    state = step.autocast
    # The probe stands outside of the region, so that it sees it being entered.
    region = (
        (lambda: torch.autocast(state["device"], dtype=getattr(torch, state["dtype"])))
        if state
        else contextlib.nullcontext
    )
    root = None
    try:
        with torch.enable_grad(), probe:
            with region():
                way = step.run(step.model, batch)
            root = _root(way, probe)
            way.back()
    except NanhuntError:
        raise
    except Exception as error:  # noqa: BLE001 - a step may raise anything, and what was seen until then counts
        return root, _refusal(error), f"{type(error).__name__}: {first_line(error)}"
    return root, None, ""


def _root(way: _Way, probe: DtypeProbe) -> Root | None:
    """The loss; None without one."""
    if way.gradients is not None:
        return None
    (loss,) = way.roots
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TargetError(f"the loss is a {type(loss).__name__}, not a single number")
    with untraced(), torch.no_grad():
        return Root(name_of(loss.dtype), float(loss), probe.maker_of(loss))


def _refusal(error: Exception) -> LinalgInput | None:
    """A decomposition that refused half, as far as its words tell."""
    words = _REFUSES_HALF.search(first_line(error))
    if words is None:
        return None
    place = OpPlace(words["op"], "forward", "", _line_of(error))
    return LinalgInput(place, _TYPES[words["dtype"]], None, first_line(error))


def _line_of(error: Exception) -> SourceLine | None:
    """The user's innermost line that was running."""
    line, running = None, error.__traceback__
    while running is not None:
        if kind_of(running.tb_frame.f_code) == USERS:
            line = source_line(running.tb_frame.f_code, running.tb_lasti)
        running = running.tb_next
    return line


def _facts(step: _Step, audit: DtypeAudit) -> Iterator[tuple[str, str]]:
    yield "operations", f"{audit.num_ops:,}"
    halves = ", ".join(audit.half_parameters)
    yield "parameters", f"{sum(p.numel() for p in step.model.parameters()):,}{f', in {halves}' if halves else ''}"
    if step.autocast:
        yield "autocast", f"{step.autocast['dtype']} on {step.autocast['device']}, as captured"
    yield "loss", f"{audit.root.value:.6g} in {audit.root.dtype}, {step.loss}" if audit.root is not None else step.loss
    types: dict[str, int] = {}
    for use in audit.uses:
        types[use.output] = types.get(use.output, 0) + use.count
    yield "results", ", ".join(f"{number:,} in {dtype}" for dtype, number in types.items())
    compared = sum(use.error is not None for use in audit.uses)
    yield "against float64", f"{count(compared, 'operation')} by place and types"


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
