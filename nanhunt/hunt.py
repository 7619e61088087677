"""``nanhunt.trace``: the exact tracer around anybody's loop, and the report of what it saw."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanhunt.findings import ChainLink, Finding, Magnitudes, Report, Skip, Verdict
from nanhunt.numerics import count
from nanhunt.observe.backward_evidence import is_in_hook_of_activation, with_consequence
from nanhunt.observe.call import Origin
from nanhunt.observe.compiled import keep_out
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.health import HealthProbe
from nanhunt.observe.loop import LoopFollower, Outputs
from nanhunt.observe.origins import find_origin
from nanhunt.observe.ranks import Entry, Ranks, joined, rank
from nanhunt.records.health import Extent, Health
from nanhunt.records.ops import OpRecord, StateSource, Trace
from nanhunt.rules.registry import Case, judge, judge_record


class Hunt:
    """A traced loop; use ``nanhunt.trace``."""

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        outputs: Outputs = "auto",
        finite: bool = True,
        ranks_timeout_s: float = 5.0,
    ) -> None:
        if outputs not in ("auto", "always", "never"):
            raise ValueError(f"outputs is 'auto', 'always' or 'never', not {outputs!r}")
        if not 0 <= ranks_timeout_s < math.inf:
            raise ValueError(f"ranks_timeout_s is a number of seconds, not {ranks_timeout_s!r}")
        self._tracer = ExactTracer(origin=self._origin)
        self._health = HealthProbe(self._tracer.path) if finite else None
        self._follower = LoopFollower(self._tracer, model, optimizer, outputs, self._health)
        self._ranks = Ranks(ranks_timeout_s)
        self._rank = rank()
        self._seconds = 0.0
        self._ended_in = ""

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._ranks.begin()
        self._follower.__enter__()
        self._tracer.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._tracer.__exit__(kind, error, trace)
        self._follower.__exit__(kind, error, trace)
        self._seconds += time.perf_counter() - self._started
        if isinstance(error, torch.linalg.LinAlgError) and self._tracer.refusal and not self._tracer.ledger.sinks:
            record, evidence = self._tracer.refusal
            self._tracer.ledger.end_in_refusal(record)
            self._tracer.evidence[record.index] = evidence
        if error is not None:
            self._ended_in = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if self._ranks.is_distributed:
            self._rank = rank()
            self._tracer.guarded(self._publish)

    def _publish(self) -> None:
        self._ranks.publish(self._entry(self._read_health()))

    def _origin(self, tensor: Tensor) -> Origin:
        models = [("", self._follower.model)] if self._follower.model is not None else []
        return find_origin(tensor, models, self._follower.optimizers)

    def reached(self, kind: str, named: Iterable[tuple[str, Tensor]]) -> None:
        """Says that these tensors must be finite, as the loss and the gradients of the model must be anyway.

        To be called inside the trace; a non-finite one becomes a place of harm, of this ``kind``.
        """
        self._tracer.guarded(self._tracer.reached, kind, named)

    def report(self) -> Report:
        """What was found: ``report.first`` is the first offender, or None when nothing is wrong."""
        trace = self._tracer.trace
        heard = self._ranks.heard()
        health = self._read_health()
        findings, chain = joined(self._entry(health), heard)
        judged = judge_record(health or Health())
        findings = [*findings, *self._finite_trouble(judged.findings, findings)]
        return Report(
            title="traced loop",
            facts=tuple(self._facts(trace)),
            findings=tuple(findings),
            chain=chain,
            verdict=_verdict(findings),
            skips=tuple(dict.fromkeys([*self._skips(trace, heard.reason), *judged.skips])),
            seconds=self._seconds,
            magnitudes=_magnitudes(health) if health is not None else None,
        )

    def _read_health(self) -> Health | None:
        return self._health.records() if self._health is not None else None

    def _entry(self, health: Health | None) -> Entry | None:
        """The first finding of this rank."""
        trace = self._tracer.trace
        offender = trace.first_offender
        if offender is None:
            return None
        return Entry(
            rank=self._rank,
            finding=self._finding(offender, trace, health),
            is_received=isinstance(offender, StateSource) and offender.kind == "collective",
            index=offender.found_at if isinstance(offender, StateSource) else offender.index,
            chain=tuple(_chain(offender, trace)),
        )

    def _finding(self, offender: OpRecord | StateSource, trace: Trace, health: Health | None) -> Finding:
        evidence = with_consequence(self._tracer.evidence, offender, trace)
        updates = self._tracer.guarded(self._follower.updates.records)
        trace = replace(trace, updates=updates) if updates is not None else trace
        finding = judge(Case(offender, evidence, trace, offender.step, offender.micro_step, self._rank, health))
        where = finding.location
        is_elsewhere = where.tensor or where.forward_op or where.phase not in ("optimizer", "backward")
        if is_elsewhere or is_in_hook_of_activation(evidence):
            return finding
        # No forward line leads there; the tensor that was harmed first does.
        harmed = next((sink for sink in trace.sinks if offender.index in sink.births), None)
        return replace(finding, location=replace(where, tensor=harmed.name)) if harmed is not None else finding

    def _finite_trouble(self, trouble: Iterable[Finding], findings: Sequence[Finding]) -> Iterator[Finding]:
        """What was wrong while all values were finite, up to the step of the fault."""
        last = findings[0].location.step if findings else None
        known = {finding.location.phase for finding in findings}
        for finding in trouble:
            step = finding.location.step
            is_symptom = finding.severity == "error" and finding.location.phase in known
            if not is_symptom and (last is None or step is None or step <= last):
                yield replace(finding, location=replace(finding.location, rank=self._rank))

    def _facts(self, trace: Trace) -> Iterator[tuple[str, str]]:
        yield "steps", f"{self._tracer.ledger.step:,}"
        yield "operations", f"{trace.num_ops:,}"
        if self._tracer.compiled.names:
            yield "compiled code", f"traced in eager mode: {', '.join(self._tracer.compiled.names)}"
        if self._ended_in:
            yield "ended in", self._ended_in
        for what, number in self._follower.notes.items():
            yield what, f"{number:,}"

    def _skips(self, trace: Trace, unheard: str) -> Iterator[Skip]:
        for problem in trace.problems:
            yield Skip("looking at an operation", problem)
        for problem in self._health.problems if self._health is not None else ():
            yield Skip("looking for finite trouble", problem)
        for kind, number in trace.skipped:
            yield Skip(f"looking at {count(number, kind)}", "its values cannot be read")
        if self._tracer.compiled.names:
            reason = "traced as it is written; nanhunt.compare_compiled(model, batch) runs the step both ways"
            yield Skip("looking for faults of the compiled code alone", reason)
        if self._tracer.is_passive:
            yield Skip("the steps after the fault", "what follows it are symptoms")
        if unheard:
            yield Skip("joining the ranks", unheard)


def trace(
    model: nn.Module | None = None, optimizer: Optimizer | Sequence[Optimizer] | None = None, **options: Any
) -> Hunt:
    """Traces every operation of a loop, and finds the first one that made a non-finite value that does harm.

    Use as ``with nanhunt.trace(model, optimizer) as hunt:`` around any loop, then ``hunt.report()``. The loop may
    raise; the exception passes through. Values, random numbers and results are the same with and without it.

    Args:
        model: The model; None to take the first module with parameters that is called.
        optimizer: The optimizer whose steps are counted, of several the first; None for the first that steps.
        options: ``outputs``: when a non-finite output of the model is harm. "auto" (default): where no backward pass
            follows, as in evaluation. "always". "never". ``finite``: whether to look for trouble that is still finite
            as well (growth, dead or subnormal gradients, lost updates), True. ``ranks_timeout_s``: how long the report
            of a distributed run waits for what the other ranks have found, 5 seconds.

    Returns:
        The hunt; its ``report()`` has ``findings`` and ``first``.

    Raises:
        ValueError: If ``outputs`` is none of these, or ``ranks_timeout_s`` no number of seconds.
    """
    return Hunt(model, optimizer, **options)


# A compiled function may hold the whole trace.
keep_out(trace, Hunt.__init__, Hunt.__enter__, Hunt.__exit__, Hunt.report)


def _chain(offender: OpRecord | StateSource, trace: Trace) -> Iterator[ChainLink]:
    """From the offender to the sinks it reached."""
    if isinstance(offender, OpRecord):
        of = f" in the backward of {offender.forward_op}" if offender.forward_op else ""
        what, facts = f"{offender.op}{of}", offender.outputs[0] if offender.outputs else None
    else:
        what, facts = f"{offender.kind} {offender.name}".strip(), offender.facts
    if facts is not None:
        detail = f"{facts.num_nonfinite:,} of {count(facts.num_elements, 'element')}"
        yield ChainLink(what, detail, facts.num_nonfinite, facts.num_elements)
    by_kind: dict[str, list[str]] = {}
    for sink in trace.sinks:
        names = by_kind.setdefault(sink.kind, [])
        if sink.name not in names:
            names.append(sink.name)
    for kind, names in by_kind.items():
        shown = ", ".join(names[:3])
        yield ChainLink(f"{kind}", shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more")


def _magnitudes(health: Health) -> Magnitudes | None:
    """How large outputs and their gradients were, as far as the health probe has looked."""
    steps = sorted({sample.step for module in health.modules for sample in module.samples})
    if not steps:
        return None
    samples = [{sample.step: sample for sample in module.samples} for module in health.modules]
    return Magnitudes(
        modules=tuple(module.name for module in health.modules),
        steps=tuple(steps),
        activations=tuple(tuple(_size(row[n].output if n in row else None) for n in steps) for row in samples),
        gradients=tuple(tuple(_size(row[n].output_gradient if n in row else None) for n in steps) for row in samples),
    )


def _size(extent: Extent | None) -> float | None:
    return extent.magnitude if extent is not None else None


def _verdict(findings: list[Finding]) -> Verdict:
    if not findings:
        return Verdict("observed", ("no non-finite value did harm",))
    first = findings[0]
    if first.cause == "unknown":
        return Verdict("unknown", ("the place was observed; why it happened is not known", "nothing was tested"))
    return Verdict("observed", (f"{first.cause}: the values at the offending elements say so", "nothing was tested"))
