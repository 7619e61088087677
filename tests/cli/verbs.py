"""Every verb that gives a report, made to give the one that is wanted."""

import sys
from types import ModuleType

import pytest

from nanhunt.cli import app as program
from nanhunt.findings import Finding, Location, Report, Verdict
from nanhunt.records.steps import StepOutcome

AUDITS = ("optimizer", "dtype", "init", "data")
GIVING = ("replay", "audit", *(f"audit-{part}" for part in AUDITS))
FOUND = {"clean": (), "warning": ("warning",), "error": ("error", "warning")}
_RULES = {"warning": ("NH304", "lost-update"), "error": ("NH303", "infinite-second-moment")}


def finding(severity: str) -> Finding:
    code, name = _RULES[severity]
    location = Location("optimizer", tensor="head.weight", step=3)
    return Finding(code, name, severity, "observed", name, "it is so", location)


def report(what: str = "clean") -> Report:
    outcome = StepOutcome(loss=1.0)
    found = tuple(map(finding, FOUND[what]))
    return Report("a run", (("steps", "4"),), found, (), Verdict("observed", ("it is said",)), baseline=outcome)


class Verbs:
    """The program in a folder of its own, whose verbs find what is wanted.

    Attributes:
        num_runs: How often a verb did its work.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.num_runs = 0
        self.find(report())

    def find(self, given: Report) -> None:
        """From here on they give this report."""

        def give(*args: object, **kwargs: object) -> Report:
            self.num_runs += 1
            return given

        import nanhunt.audit.subject
        import nanhunt.experiments.replay

        subject = nanhunt.audit.subject.Subject("x.pt", None, None)
        self._patch.setattr(nanhunt.audit.subject, "find_subject", lambda *args: subject)
        self._patch.setattr(nanhunt.experiments.replay, "replay", give)
        for part in AUDITS:
            module = ModuleType(f"nanhunt.audit.{part}")
            module.audit_subject = give
            self._patch.setitem(sys.modules, module.__name__, module)

    def __call__(self, *args: object) -> tuple[int, str, str]:
        """Runs the program; gives exit code, standard output and standard error."""
        self._patch.setattr(sys, "argv", ["nanhunt", *map(str, args)])
        code = 0
        try:
            program.main()
        except SystemExit as ended:
            code = ended.code
        return code, *self._capsys.readouterr()
