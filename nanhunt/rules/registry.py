"""What a rule is, and how the rules are found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import nanhunt.rules
from nanhunt.findings import Finding, Location, Severity
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.health import Health
from nanhunt.records.ops import OpRecord, StateSource, Trace


@dataclass(frozen=True)
class Case:
    """What a rule judges: the first offender of a traced step.

    Attributes:
        offender: The operation or the tensor.
        evidence: The values at its offending elements; None where none could be gathered.
        trace: The whole trace.
        step: Optimizer step.
        micro_step: Part of an accumulated step.
        rank: Process of a distributed run.
    """

    offender: OpRecord | StateSource
    evidence: OffenderEvidence | None = None
    trace: Trace = field(default_factory=lambda: Trace(0, ()))
    step: int = 0
    micro_step: int = 0
    rank: int = 0

    @property
    def op(self) -> OpRecord | None:
        """The offender where it is an operation."""
        return self.offender if isinstance(self.offender, OpRecord) else None

    def operand(self, name: str) -> Operand | None:
        """The offender's input of this schema name."""
        operands = self.evidence.operands if self.evidence else ()
        return next((operand for operand in operands if operand.name == name), None)


@dataclass(frozen=True)
class Judgement:
    """What a rule says of what it applies to: the fact, its numbers, the context, what to try.

    Attributes:
        message: The fact.
        evidence: Its numbers.
        notes: The context.
        help: What to try.
        location: Where, in a run's health; the offender of a step has its own.
    """

    message: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()
    location: Location | None = None


@dataclass(frozen=True)
class Rule:
    """One cause.

    Attributes:
        code: ``NH203``.
        name: Kebab case; names the fault.
        cause: Kebab-case cause, or ``unknown`` for a rule that only says where.
        judge: The judgement, or None where the predicate does not hold.
        judges: What it is given: the first offender of a step, or the health of a run.
        severity: Of its findings.
    """

    code: str
    name: str
    cause: str
    judge: Callable[[Any], Judgement | None]
    judges: type[Case] | type[Health] = Case
    severity: Severity = "error"


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, by code.

    Raises:
        ValueError: If two rules have the same code.
    """
    names = sorted(module.name for module in iter_modules(nanhunt.rules.__path__) if module.name.startswith("nh"))
    rules = tuple(import_module(f"nanhunt.rules.{name}").RULE for name in names)
    codes = [rule.code for rule in rules]
    taken = sorted({code for code in codes if codes.count(code) > 1})
    if taken:
        raise ValueError(f"rule code {taken[0]} is taken twice")
    return rules


def judge(case: Case) -> Finding:
    """The finding for the first offender: of the first rule that names a cause, else of the one that says where."""
    rules = [rule for rule in all_rules() if rule.judges is Case]
    ordered = sorted(rules, key=lambda rule: (rule.cause == "unknown", rule.code))
    for rule in ordered:
        judgement = rule.judge(case)
        if judgement is not None:
            return _finding(rule, judgement, locate(case), _own_backward(case))
    raise ValueError(f"no rule covers {case.offender}")


def judge_health(health: Health) -> list[Finding]:
    """What is wrong with a run whose values are finite, the earliest step first; empty for a healthy one."""
    findings = []
    for rule in all_rules():
        judgement = rule.judge(health) if rule.judges is Health else None
        if judgement is not None:
            assert judgement.location is not None
            findings.append(_finding(rule, judgement, judgement.location))
    return sorted(findings, key=lambda finding: (finding.location.step or 0, finding.code))


def _finding(rule: Rule, judgement: Judgement, location: Location, notes: tuple[str, ...] = ()) -> Finding:
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=rule.severity,
        certainty="unknown" if rule.cause == "unknown" else "observed",
        cause=rule.cause,
        message=judgement.message,
        location=location,
        evidence=judgement.evidence,
        notes=(*judgement.notes, *notes),
        help=judgement.help,
    )


def _own_backward(case: Case) -> tuple[str, ...]:
    """The line of a backward that the user wrote; the location is that of its forward."""
    line = case.op.own_backward if case.op else None
    return (f"it ran in a backward of your own, line {line.line}: {line.text}",) if line else ()


_SOURCE_PHASES = {
    "batch": "data",
    "output gradient": "backward",
    "collective": "backward",
    "optimizer state": "optimizer",
    "uninitialised memory": "forward",
}


def locate(case: Case) -> Location:
    """Where the offender is, in the terms of a finding."""
    if isinstance(case.offender, StateSource):
        source = case.offender
        return Location(
            phase=source.phase or _SOURCE_PHASES.get(source.kind, "weights"),
            op=source.op,
            module=source.module,
            tensor=source.name,
            source=source.source,
            step=case.step,
            micro_step=case.micro_step,
            rank=case.rank,
        )
    record = case.offender
    return Location(
        phase="optimizer" if record.phase in ("clip", "optimizer") else record.phase,
        op=record.op,
        forward_op=record.forward_op or "",
        module=record.module,
        source=record.source,
        step=case.step,
        micro_step=case.micro_step,
        rank=case.rank,
    )
