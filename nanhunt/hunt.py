"""``nanhunt.trace``: the exact tracer around anybody's loop, and the report of what it saw."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.findings import ChainLink, Finding, Report, Skip, Verdict
from nanhunt.numerics import count
from nanhunt.observe.call import Origin
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.loop import LoopFollower, Outputs
from nanhunt.observe.origins import find_origin
from nanhunt.records.ops import OpRecord, StateSource, Trace
from nanhunt.rules.registry import Case, judge


class Hunt:
    """A traced loop; use ``nanhunt.trace``."""

    def __init__(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None, *, outputs: Outputs = "auto"
    ) -> None:
        if outputs not in ("auto", "always", "never"):
            raise ValueError(f"outputs is 'auto', 'always' or 'never', not {outputs!r}")
        self._tracer = ExactTracer(origin=self._origin)
        self._follower = LoopFollower(self._tracer, model, optimizer, outputs)
        self._seconds = 0.0
        self._ended_in = ""

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._follower.__enter__()
        self._tracer.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._tracer.__exit__(kind, error, trace)
        self._follower.__exit__(kind, error, trace)
        self._seconds += time.perf_counter() - self._started
        if error is not None:
            self._ended_in = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _origin(self, tensor: Tensor) -> Origin:
        models = [("", self._follower.model)] if self._follower.model is not None else []
        return find_origin(tensor, models, self._follower.optimizers)

    def report(self) -> Report:
        """What was found: ``report.first`` is the first offender, or None when nothing is wrong."""
        trace = self._tracer.trace
        offender = trace.first_offender
        findings = [self._finding(offender, trace)] if offender is not None else []
        return Report(
            title="traced loop",
            facts=tuple(self._facts(trace)),
            findings=tuple(findings),
            chain=tuple(_chain(offender, trace)) if offender is not None else (),
            verdict=_verdict(findings),
            skips=tuple(self._skips(trace)),
            seconds=self._seconds,
        )

    def _finding(self, offender: OpRecord | StateSource, trace: Trace) -> Finding:
        evidence = self._tracer.evidence.get(offender.index) if isinstance(offender, OpRecord) else None
        finding = judge(Case(offender, evidence, trace, offender.step, offender.micro_step, rank()))
        where = finding.location
        if where.tensor or where.forward_op or where.phase not in ("optimizer", "backward"):
            return finding
        # No forward line leads there; the tensor that was harmed first does.
        harmed = next((sink for sink in trace.sinks if offender.index in sink.births), None)
        return replace(finding, location=replace(where, tensor=harmed.name)) if harmed is not None else finding

    def _facts(self, trace: Trace) -> Iterator[tuple[str, str]]:
        yield "steps", f"{self._tracer.ledger.step:,}"
        yield "operations", f"{trace.num_ops:,}"
        if self._ended_in:
            yield "ended in", self._ended_in
        for what, number in self._follower.notes.items():
            yield what, f"{number:,}"

    def _skips(self, trace: Trace) -> Iterator[Skip]:
        for problem in trace.problems:
            yield Skip("looking at an operation", problem)
        for kind, number in trace.skipped:
            yield Skip(f"looking at {count(number, kind)}", "its values cannot be read")
        if self._tracer.is_passive:
            yield Skip("the steps after the fault", "what follows it are symptoms")


def trace(model: nn.Module | None = None, optimizer: Optimizer | None = None, **options: Any) -> Hunt:
    """Traces every operation of a loop, and finds the first one that made a non-finite value that does harm.

    Use as ``with nanhunt.trace(model, optimizer) as hunt:`` around any loop, then ``hunt.report()``. The loop may
    raise; the exception passes through. Values, random numbers and results are the same with and without it.

    Args:
        model: The model; None to take the first module with parameters that is called.
        optimizer: The optimizer whose steps are counted; None for the first that steps.
        options: ``outputs``: when a non-finite output of the model is harm. "auto" (default): where no backward pass
            follows, as in evaluation. "always". "never".

    Returns:
        The hunt; its ``report()`` has ``findings`` and ``first``.

    Raises:
        ValueError: If ``outputs`` is none of these.
    """
    return Hunt(model, optimizer, **options)


def rank() -> int:
    """The process's number in a distributed run; 0 outside."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _chain(offender: OpRecord | StateSource, trace: Trace) -> Iterator[ChainLink]:
    """From the offender to the sinks it reached."""
    if isinstance(offender, OpRecord):
        of = f" in the backward of {offender.forward_op}" if offender.forward_op else ""
        what, facts = f"{offender.op}{of}", offender.outputs[0] if offender.outputs else None
    else:
        what, facts = f"{offender.kind} {offender.name}".strip(), offender.facts
    if facts is not None:
        yield ChainLink(what, f"{facts.num_nonfinite:,} of {count(facts.num_elements, 'element')}")
    by_kind: dict[str, list[str]] = {}
    for sink in trace.sinks:
        names = by_kind.setdefault(sink.kind, [])
        if sink.name not in names:
            names.append(sink.name)
    for kind, names in by_kind.items():
        shown = ", ".join(names[:3])
        yield ChainLink(f"{kind}", shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more")


def _verdict(findings: list[Finding]) -> Verdict:
    if not findings:
        return Verdict("observed", ("no non-finite value did harm",))
    first = findings[0]
    if first.cause == "unknown":
        return Verdict("unknown", ("the place was observed; why it happened is not known", "nothing was tested"))
    return Verdict("observed", (f"{first.cause}: the values at the offending elements say so", "nothing was tested"))
