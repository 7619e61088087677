"""What a rule is, how the rules are found, and how they are asked."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal, NamedTuple

import nanhunt.rules
from nanhunt.errors import NanhuntError, first_line
from nanhunt.findings import Finding, Location, Severity, Skip
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.health import Health
from nanhunt.records.ops import OpRecord, StateSource, Trace

GROUP = "nanhunt.rules"
"""Entry points of this group are rules of other packages."""

Status = Literal["preview", "stable", "deprecated"]


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
        health: The run up to there, while it was finite; None where nobody looked.
    """

    offender: OpRecord | StateSource
    evidence: OffenderEvidence | None = None
    trace: Trace = field(default_factory=lambda: Trace(0, ()))
    step: int = 0
    micro_step: int = 0
    rank: int = 0
    health: Health | None = None

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
        location: Where; the offender of a step has its own.
        severity: Of this finding, where it is not the rule's.
    """

    message: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()
    location: Location | None = None
    severity: Severity | None = None


Outcome = Judgement | Skip | None | tuple["Judgement | Skip", ...]
"""What a rule may answer: one judgement or several, why it could not judge, or that nothing is wrong."""


@dataclass(frozen=True)
class Rule:
    """One cause.

    Attributes:
        code: ``NH203``.
        name: Kebab case; names the fault.
        cause: Kebab-case cause, or ``unknown`` for a rule that only says where.
        judge: What it says of a record. Of a first offender: a judgement, or None where the predicate does not hold. Of
            other records it may also say several things, or why it cannot judge.
        judges: Type of the record it is given: the first offender of a step, the health of a run, an audit.
        severity: Of its findings, by default.
        status: ``preview`` while its thresholds may still move, ``deprecated`` before it goes.
        goes_before: Codes of the rules that say less where this one holds as well.
    """

    code: str
    name: str
    cause: str
    judge: Callable[[Any], Outcome]
    judges: type = Case
    severity: Severity = "error"
    status: Status = "stable"
    goes_before: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module it stands in."""
        return self.judge.__module__

    @property
    def doc(self) -> str:
        """The docstring of its file, which is its page."""
        return (sys.modules[self.module].__doc__ or "").strip()


class Found(NamedTuple):
    """The rules that are there, and those of other packages that cannot be loaded."""

    rules: tuple[Rule, ...]
    unusable: tuple[Skip, ...]


@cache
def find_rules() -> Found:
    """Every rule, by code: those of this folder, then those of installed packages.

    Raises:
        NanhuntError: If two rules have the same code.
    """
    rules = [_of_file(name) for name in _files()]
    unusable = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            rule = point.load()
        except Exception as error:  # noqa: BLE001 - another package's code; the reason becomes a skip
            unusable.append(
                Skip(f"the rule {point.name} ({point.value})", f"{type(error).__name__}: {first_line(error)}")
            )
            continue
        if isinstance(rule, Rule):
            rules.append(rule)
        else:
            unusable.append(
                Skip(f"the rule {point.name} ({point.value})", f"it is a {type(rule).__name__}, not a Rule")
            )
    rules.sort(key=lambda rule: rule.code)
    codes = [rule.code for rule in rules]
    taken = sorted({code for code in codes if codes.count(code) > 1})
    if taken:
        modules = " and ".join(rule.module for rule in rules if rule.code == taken[0])
        raise NanhuntError(f"rule code {taken[0]} is taken twice: by {modules}")
    return Found(tuple(rules), tuple(unusable))


def _files() -> list[str]:
    return sorted(module.name for module in iter_modules(nanhunt.rules.__path__) if module.name.startswith("nh"))


def _of_file(name: str) -> Rule:
    rule: Rule = import_module(f"nanhunt.rules.{name}").RULE
    return rule


def find_own_rule(word: str) -> Rule | None:
    """The rule of this folder with this code or name, without loading the others; None if there is none.

    None as well where other packages add rules: only all of them together tell whether a code is taken twice.
    """
    if entry_points(group=GROUP):
        return None
    # A rule's code and name are those of its file.
    wanted = word.lower().replace("-", "_")
    return next((_of_file(name) for name in _files() if wanted in (name[:5], name[6:])), None)


def all_rules() -> tuple[Rule, ...]:
    """Every rule, by code.

    Raises:
        NanhuntError: If two rules have the same code.
    """
    return find_rules().rules


def judge(case: Case) -> Finding:
    """The finding for the first offender: of a rule that names a cause, else of the one that says where.

    Where several name one, the rule that says more goes first, then the lower code.
    """
    answers = {rule.code: _asked(rule, case) for rule in all_rules() if rule.judges is Case}
    holding = [rule for rule in all_rules() if isinstance(answers.get(rule.code), Judgement)]
    said_better = {code for rule in holding for code in rule.goes_before}
    holding.sort(key=lambda rule: (rule.cause == "unknown", rule.code in said_better, rule.code))
    if not holding:
        raise ValueError(f"no rule covers {case.offender}")
    judgement = answers[holding[0].code]
    assert isinstance(judgement, Judgement)
    failed = [f"{code} could not judge: {said.reason}" for code, said in answers.items() if isinstance(said, Skip)]
    notes = (*_own_backward(case), *failed)
    return _finding(holding[0], judgement, judgement.location or locate(case), notes)


def _asked(rule: Rule, record: Any) -> Outcome:
    """What the rule says; its own failure is a reason for not judging, never the end of the report."""
    try:
        return rule.judge(record)
    except Exception as error:  # noqa: BLE001 - a rule may be anybody's, and records come from files
        return Skip(rule.code, f"the rule failed: {type(error).__name__}: {first_line(error)}")


class Judged(NamedTuple):
    """What the rules say of one record.

    Attributes:
        findings: What is wrong, the earliest step first, then errors first.
        passes: Codes of the rules that found nothing wrong.
        skips: Rules that could not judge.
    """

    findings: tuple[Finding, ...]
    passes: tuple[str, ...]
    skips: tuple[Skip, ...]


def judge_record(record: Any) -> Judged:
    """What every rule for this type of record says of it."""
    findings: list[Finding] = []
    passes: list[str] = []
    skips: list[Skip] = list(find_rules().unusable)
    for rule in all_rules():
        if rule.judges is not type(record):
            continue
        outcome = _asked(rule, record)
        answers = outcome if isinstance(outcome, tuple) else (outcome,) if outcome is not None else ()
        if not answers:
            passes.append(rule.code)
        for answer in answers:
            if isinstance(answer, Judgement) and answer.location is not None:
                findings.append(_finding(rule, answer, answer.location))
            elif isinstance(answer, Skip):
                skips.append(Skip(f"{rule.code} {rule.name}", answer.reason))
            else:
                skips.append(Skip(f"{rule.code} {rule.name}", "its answer is no judgement with a location"))
    findings.sort(key=lambda found: (found.location.step or 0, found.severity != "error", found.code))
    return Judged(tuple(findings), tuple(passes), tuple(skips))


def _finding(rule: Rule, judgement: Judgement, location: Location, notes: tuple[str, ...] = ()) -> Finding:
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=judgement.severity or rule.severity,
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
