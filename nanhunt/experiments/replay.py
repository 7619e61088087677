"""A whole replay: trace the step, judge it, run the grid and the experiments, conclude."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanhunt.capture.checkpoint import read_checkpoint
from nanhunt.capture.format import Capture, read_capture
from nanhunt.capture.replay import Replayer
from nanhunt.capture.step import Batches, Change, ReplayedStep
from nanhunt.errors import TargetError, first_line
from nanhunt.experiments.changes import Diagnosis, proposed_changes
from nanhunt.experiments.verdict import LEGACY_LIMITS, decide
from nanhunt.findings import ChainLink, Finding, Report, Skip
from nanhunt.numerics import count
from nanhunt.observe.backward_evidence import with_consequence
from nanhunt.observe.evidence import gather_evidence
from nanhunt.observe.exact import ExactTracer
from nanhunt.observe.op_info import FocusReached
from nanhunt.records.evidence import OffenderEvidence
from nanhunt.records.ops import OpRecord, Trace, ValueFacts
from nanhunt.records.steps import Determinism, ExperimentResult, GridCell, StepOutcome, Tally
from nanhunt.rules.registry import Case, judge
from nanhunt.targets import Target, find_target

Progress = Callable[[str], None]


def replay(
    path: str | Path,
    *,
    target: str | Any = None,
    checkpoint: str | Path | None = None,
    num_seeds: int = 2,
    progress: Progress = lambda what: None,
) -> Report:
    """Replays a captured step and tests what made it non-finite.

    Args:
        path: A capture, current or legacy.
        target: ``module:attribute``, the name of an installed target, or a target object; None for the recorded one.
        checkpoint: Weights to use instead of the captured ones: a state dict, or a dict with one inside.
        num_seeds: Fresh initialisations to try, 0 or more.
        progress: Called with what is being run, before each step.

    Returns:
        The report; on Ctrl-C one of what was done by then, with the rest as skips.

    Raises:
        CaptureError: If the file cannot be read.
        TargetError: If no target fits it.
    """
    capture = read_capture(path)
    found = _target(target, capture)
    weights = read_checkpoint(Path(checkpoint)) if checkpoint is not None else None
    replayer = Replayer(capture, found, weights)
    session = _Session(replayer.capture, found, replayer, num_seeds, progress)
    started = time.perf_counter()
    try:
        session.run_all()
    except KeyboardInterrupt:
        session.skips.append(Skip("the rest of the replay", "interrupted"))
    return replace(session.report(), seconds=time.perf_counter() - started)


def _target(target: Any, capture: Capture) -> Target:
    recorded = capture.meta.get("target")
    if target is None and recorded is None and not capture.is_legacy:
        raise TargetError("the capture names no target", help="say how the model is built: --target mymodel:MyModel")
    if target is None or isinstance(target, str):
        return find_target(target, recorded)
    return target if isinstance(target, Target) else Target(type(target).__name__, target)


@dataclass
class _Session:
    """The replay while it is under way; what it has by an interruption can still be reported."""

    capture: Capture
    target: Target
    replayer: Replayer
    num_seeds: int
    progress: Progress
    baseline: StepOutcome | None = None
    determinism: Determinism = field(default_factory=lambda: Determinism("unknown", "not run"))
    trace: Trace | None = None
    at_birth: dict[int, OffenderEvidence] = field(default_factory=dict)
    finding: Finding | None = None
    chain: list[ChainLink] = field(default_factory=list)
    grid: list[GridCell] = field(default_factory=list)
    experiments: list[ExperimentResult] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    @property
    def _base_seed(self) -> int | None:
        """Fresh weights stand in where none were captured."""
        return None if self.replayer.has_weights else 0

    @property
    def _no_batches(self) -> str:
        """Why only the model's own inputs are replayed."""
        if not self.target.has_loss:
            return f"target {self.target.name} has no loss(model, batch): only the model's own inputs are replayed"
        return "no batch was captured, only the model's own inputs"

    def run_all(self) -> None:
        self.progress("the captured step, under the exact tracer")
        step = self._traced()
        self.baseline = step.outcome
        self.determinism = self.replayer.determinism(step)
        self._judge(step)
        del step
        control = self._control()
        self._run_grid(control)
        self._run_experiments(control)

    def _traced(self) -> ReplayedStep:
        tracer = ExactTracer()
        step = self.replayer.run(tracer=tracer, seed=self._base_seed, look_ahead=True)
        self.trace, self.at_birth = tracer.trace, tracer.evidence
        self.skips += [Skip("looking at an operation", problem) for problem in self.trace.problems]
        self.skips += [
            Skip(f"looking at {count(number, kind)}", "its values cannot be read")
            for kind, number in self.trace.skipped
        ]
        return step

    def _judge(self, step: ReplayedStep) -> None:
        assert self.trace is not None
        offender = self.trace.first_offender
        if offender is None:
            return
        # What was seen at once, for an interruption of the second run.
        evidence = born = with_consequence(self.at_birth, offender, self.trace)
        self.finding = judge(Case(offender, evidence, self.trace, self.capture.step))
        self.chain = list(_chain(offender, self.trace, step))
        if isinstance(offender, OpRecord):
            self.progress("the same again, keeping the offender's inputs")
            wanted = [offender.index] + ([offender.forward_index] if offender.forward_index is not None else [])
            tracer = ExactTracer(focus=wanted)
            with contextlib.suppress(FocusReached):
                self.replayer.run(tracer=tracer, seed=self._base_seed)
            kept = tracer.focused.get(offender.index)
            if kept is not None and kept.op == offender.op:
                forward = tracer.focused.get(offender.forward_index) if offender.forward_index is not None else None
                evidence = gather_evidence(kept, forward)
                if evidence is not None and born is not None:
                    # What only the running backward pass knows: who read the result, which hook was called.
                    evidence = replace(evidence, backward=born.backward or evidence.backward)
            else:
                self.skips.append(Skip("the offender's inputs", "the second replay took another course"))
        self.finding = judge(Case(offender, evidence, self.trace, self.capture.step))

    def _control(self) -> Batches:
        if self.capture.payload.get("control"):
            return list(self.capture.payload["control"])
        if not self.capture.batches:
            self.skips.append(Skip("the control batch", self._no_batches))
            return []
        try:
            made = self.target.control_batch(0)
        except TargetError as error:
            self.skips.append(Skip("the control batch", error.message))
            return []
        if made is None:
            self.skips.append(Skip("the control batch", "none was captured, and the target makes none"))
            return []
        self.skips.append(Skip("the captured control batch", "none was captured; the target made one from seed 0"))
        return [made]

    def _run_grid(self, control: Batches) -> None:
        assert self.baseline is not None
        if not self.capture.batches:
            self.skips.append(Skip("weights against batches", self._no_batches))
            return
        name: Any = self.replayer.weights_name
        if name:
            self.grid.append(GridCell(name, "bad", None, self.baseline))
            if control:
                self._run_cell(f"{name} weights, control batch", name, "control", None, control)
        for seed in range(self.num_seeds):
            self._run_cell(f"fresh weights (seed {seed}), bad batch", "fresh", "bad", seed, None)
            if control:
                self._run_cell(f"fresh weights (seed {seed}), control batch", "fresh", "control", seed, control)

    def _run_cell(self, title: str, weights: Any, column: Any, seed: int | None, batches: Batches | None) -> None:
        self.progress(title)
        try:
            outcome = self.replayer.run(seed=seed, batches=batches).outcome
        except TargetError as error:
            # The captured step itself did run: what is known of it is not to be lost over a comparison.
            self.skips.append(Skip(title, error.message))
            return
        self.grid.append(GridCell(weights, column, seed, outcome))

    def _run_experiments(self, control: Batches) -> None:
        assert self.baseline is not None
        assert self.trace is not None
        if self.baseline.is_finite:
            self.skips.append(Skip("experiments", "the step is finite as it is: there is nothing to flip"))
            return
        offender = self.trace.first_offender
        record = offender if isinstance(offender, OpRecord) else None
        diagnosis = Diagnosis(self.capture, self.target, self.finding, record, control)
        for change in proposed_changes(diagnosis):
            if isinstance(change, Skip):
                self.skips.append(change)
                continue
            self.progress(change.title)
            self.experiments.append(self._experiment(change))

    def _experiment(self, change: Change) -> ExperimentResult:
        try:
            outcome = self.replayer.run(change=change, seed=self._base_seed).outcome
        except Exception as error:  # noqa: BLE001 - an experiment that cannot run is a skip with its reason
            reason = f"{type(error).__name__}: {first_line(error)}"
            return ExperimentResult(change.name, change.title, change.family, None, skipped=reason)
        if outcome.error and not outcome.refused_values:
            # It says something of the change, not of the fault: a call that was not found, a dtype that did not fit.
            return ExperimentResult(change.name, change.title, change.family, None, skipped=outcome.error)
        return ExperimentResult(change.name, change.title, change.family, outcome, note=change.note)

    def report(self) -> Report:
        verdict = decide(
            self.baseline,
            self.finding,
            self.experiments,
            self.grid,
            is_legacy=self.capture.is_legacy,
            is_captured=self.replayer.has_weights,
        )
        finding = self.finding
        if finding is not None and verdict.certainty == "tested":
            finding = replace(finding, certainty="tested")
        if self.capture.is_legacy:
            self.skips.append(Skip("the failing step itself", LEGACY_LIMITS))
        path = self.capture.path
        return Report(
            title=f"replay of {path.name if path else 'a capture'}",
            facts=tuple(_facts(self.capture, self.target, self.baseline, self.trace)),
            findings=(finding,) if finding else (),
            chain=tuple(self.chain),
            grid=tuple(self.grid),
            experiments=tuple(self.experiments),
            baseline=self.baseline,
            determinism=self.determinism,
            verdict=verdict,
            skips=tuple(self.skips),
            num_steps=self.replayer.num_steps,
        )


def _chain(offender: Any, trace: Trace, step: ReplayedStep) -> Iterator[ChainLink]:
    """From the offender to the sinks, each station with its counts."""
    if isinstance(offender, OpRecord):
        of = f" in the backward of {offender.forward_op}" if offender.forward_op else ""
        what = f"{offender.op}{of}"
        yield _counted(what, offender.outputs[0]) if offender.outputs else ChainLink(what, "a constant")
    else:
        says_kind = offender.kind in ("batch", "output gradient")
        what = offender.name if says_kind else f"{offender.kind} {offender.name}".strip()
        yield _counted(what, offender.facts)
    later = (
        sum(1 for record in trace.ops if record.kind != "kill" and record.index > offender.index) + trace.num_dropped
    )
    if later:
        yield ChainLink("later operations", f"{later:,} non-finite")
    outcome = step.outcome
    if outcome.failed_phase == "forward":
        yield ChainLink("loss", f"{outcome.loss}" if not outcome.error else outcome.error)
    if outcome.gradients.num_tensors:
        yield _tallied("parameter gradients", outcome.gradients)
    if outcome.clipped is not None:
        yield _tallied("after clip_grad_norm_", outcome.clipped)
    if outcome.weights.num_tensors:
        yield _tallied("weights after the step", outcome.weights)
    if step.next_error:
        yield ChainLink("next forward", f"raises {step.next_error}")
    elif step.next_outputs is not None and outcome.weights.num_tensors:
        tally = step.next_outputs
        detail = f"{tally.elements:,} of {tally.num_elements:,} outputs"
        yield ChainLink("next forward", detail, tally.elements, tally.num_elements)


def _counted(what: str, facts: ValueFacts) -> ChainLink:
    detail = f"{facts.num_nonfinite:,} of {count(facts.num_elements, 'element')}"
    return ChainLink(what, detail, facts.num_nonfinite, facts.num_elements)


def _tallied(what: str, tally: Tally) -> ChainLink:
    elements = f"{tally.elements:,} of {tally.num_elements:,} elements"
    detail = f"{tally.tensors:,} of {tally.num_tensors:,} tensors ({elements})"
    return ChainLink(what, detail, tally.elements, tally.num_elements)


def _facts(
    capture: Capture, target: Target, baseline: StepOutcome | None, trace: Trace | None
) -> Iterator[tuple[str, str]]:
    yield "step", str(capture.step)
    yield "target", target.name
    if baseline is not None and baseline.error:
        yield "ended in", baseline.error
    elif baseline is not None:
        yield "loss", f"{baseline.loss:.6g}" if capture.batches else "not computed: only the model is replayed"
    if trace is not None:
        yield "operations", f"{trace.num_ops:,}"
    for position, batch in enumerate(capture.batches):
        sources = batch.get("sources") if isinstance(batch, dict) else None
        for sample, source in enumerate(sources or []):
            yield f"sample {sample}" if position == 0 else f"sample {position}.{sample}", str(source)
