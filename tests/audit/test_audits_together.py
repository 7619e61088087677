"""What one audit cannot do does not take the others along."""

import sys
from types import ModuleType

import pytest

from nanhunt.audit.report import NOTHING
from nanhunt.audit.subject import Subject
from nanhunt.cli.audit import AUDITS, _report
from nanhunt.errors import NanhuntError
from nanhunt.findings import Report, Verdict

SUBJECT = Subject("x.pt", None, None)


def fails(subject, progress):
    raise KeyError("weights")


def finds_nothing(subject, progress):
    return Report("fine", (), (), (), Verdict("observed", ("0 errors",)), absence=NOTHING)


def stopped(subject, progress):
    return Report("stopped", (), (), (), Verdict("observed", ("0 errors",)), absence="it stopped")


@pytest.fixture
def install(monkeypatch):
    def put(**audits):
        for name in AUDITS:
            module = ModuleType(f"nanhunt.audit.{name}")
            module.audit_subject = audits.get(name, finds_nothing)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_an_unexpected_error_of_one_of_several_is_a_skip(install):
    install(dtype=fails)
    report = _report(AUDITS, SUBJECT)
    assert [(skip.what, skip.reason) for skip in report.skips] == [("audit-dtype", "KeyError: 'weights'")]
    assert "audit-dtype: not done: KeyError: 'weights'" in report.verdict.sentences
    assert report.absence == "nothing was found"


def test_of_a_single_audit_it_is_one_line(install):
    install(dtype=fails)
    with pytest.raises(NanhuntError, match="the audit cannot be done: KeyError: 'weights'"):
        _report(("dtype",), SUBJECT)


def test_if_none_can_be_done_it_is_one_line_too(install):
    install(**dict.fromkeys(AUDITS, fails))
    with pytest.raises(NanhuntError, match="the audit cannot be done: KeyError"):
        _report(AUDITS, SUBJECT)


def test_an_audit_that_had_to_stop_is_not_said_to_have_found_nothing(install):
    install(dtype=stopped)
    assert _report(AUDITS, SUBJECT).absence == "it stopped"
