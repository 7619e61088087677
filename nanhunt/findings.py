"""What the rules and experiments concluded; a report prints these and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nanhunt.records.ops import SourceLine
from nanhunt.records.steps import Determinism, ExperimentResult, GridCell, StepOutcome

Severity = Literal["error", "warning"]
"""An error makes values wrong or lost; a warning is worth a look before it does."""

Certainty = Literal["tested", "observed", "unknown"]


@dataclass(frozen=True)
class Location:
    """Where a finding is.

    Attributes:
        phase: forward, backward, optimizer, data or weights.
        op: Name of the operation, such as ``aten::div_``; empty where no operation is to blame.
        forward_op: For a backward fault, the forward operation it differentiates.
        module: Dotted path; empty outside modules.
        tensor: Name of the tensor it is about, such as ``encoder.0.weight``; empty where none has one.
        source: The user's line.
        step: Optimizer step, from 0.
        micro_step: Part of an accumulated step, from 0.
        rank: Process of a distributed run.
    """

    phase: str
    op: str = ""
    forward_op: str = ""
    module: str = ""
    tensor: str = ""
    source: SourceLine | None = None
    step: int | None = None
    micro_step: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        code: Rule code, such as ``NH203``.
        name: Rule name in kebab case; reads after "allow".
        severity: error or warning.
        certainty: tested (an experiment flipped the outcome), observed, or unknown.
        cause: Kebab-case cause, or ``unknown``.
        message: A fact with its value, lower case, no full stop, never the cure.
        location: Where.
        evidence: Numbers behind it.
        notes: Context.
        help: What to try.
    """

    code: str
    name: str
    severity: Severity
    certainty: Certainty
    cause: str
    message: str
    location: Location
    evidence: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A check that could not run, with the reason; never a pass."""

    what: str
    reason: str


@dataclass(frozen=True)
class ChainLink:
    """One station on the way from the offender to the sinks.

    Attributes:
        what: The station.
        detail: What was seen there.
        num_nonfinite: Non-finite elements there; None where they were not counted.
        num_elements: All elements there.
    """

    what: str
    detail: str
    num_nonfinite: int | None = None
    num_elements: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What the experiments allow to be said.

    Attributes:
        certainty: tested where an experiment flipped the outcome.
        sentences: The conclusion, one statement each, lower case.
        flipped: Names of the changes that made the step finite.
        unmoved: Names of the changes that did not.
    """

    certainty: Certainty
    sentences: tuple[str, ...]
    flipped: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it on one line."""
        return ". ".join(self.sentences)


@dataclass(frozen=True)
class DataTable:
    """Rows of what was measured.

    Attributes:
        title: What it is.
        columns: Headings.
        rows: Numbers and words, as many as there are headings.
        note: What has to be known in order to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Magnitudes:
    """Largest absolute values by module and step, as far as they were sampled; None where they were not.

    Attributes:
        modules: Dotted paths, in program order.
        steps: Sampled steps.
        activations: Of a module's outputs, a row for each module; NaN or infinite where they were.
        gradients: Of the gradients with respect to them.
    """

    modules: tuple[str, ...]
    steps: tuple[int, ...]
    activations: tuple[tuple[float | None, ...], ...]
    gradients: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Report:
    """Everything a replay or a traced loop gave.

    Attributes:
        title: What was replayed or traced.
        facts: Short lines about it.
        findings: Faults, the first offender first.
        chain: From the offender to the sinks.
        verdict: The conclusion.
        grid: Weights against batches.
        experiments: Replays with one thing changed.
        baseline: The replayed step itself.
        determinism: Whether it was the captured step; None where nothing was replayed.
        skips: What could not be done, and why.
        seconds: Wall time.
        num_steps: Steps replayed.
        passes: Codes of the rules that looked and found nothing.
        tables: What was measured, for a person to read.
        magnitudes: How large values and gradients were, by module and step.
        absence: What it means that there is no finding; empty for what a replay or a trace says.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    chain: tuple[ChainLink, ...]
    verdict: Verdict
    grid: tuple[GridCell, ...] = ()
    experiments: tuple[ExperimentResult, ...] = ()
    baseline: StepOutcome | None = None
    determinism: Determinism | None = None
    skips: tuple[Skip, ...] = ()
    seconds: float = 0.0
    num_steps: int = 0
    passes: tuple[str, ...] = ()
    tables: tuple[DataTable, ...] = ()
    magnitudes: Magnitudes | None = None
    absence: str = ""

    @property
    def first(self) -> Finding | None:
        """The first offender, or None when nothing is wrong."""
        return self.findings[0] if self.findings else None

    def ignoring(self, reasons: Mapping[str, str]) -> "Report":
        """The report without the findings of some rules, which become skips with the reason.

        Args:
            reasons: Why, by rule code or name.
        """
        kept, skips = [], list(self.skips)
        for finding in self.findings:
            reason = reasons.get(finding.code, reasons.get(finding.name))
            if reason is None:
                kept.append(finding)
            else:
                where = finding.location.tensor or finding.location.module or finding.location.op
                skips.append(Skip(" ".join((finding.code, finding.name, where)).strip(), f"ignored: {reason}"))
        return replace(self, findings=tuple(kept), skips=tuple(skips))
