"""The scorer itself, with a tracer whose finding is made up."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import score
import torch
from scenario import Loop, Scenario, Truth

import nanhunt
from nanhunt.findings import Finding, Location
from nanhunt.records.ops import SourceLine

TRUTH = Truth("forward", ("aten::log",), "encoder.0", step=2, micro_step=1, tensor="weight")
RIGHT = {"phase": "forward", "op": "aten::log", "module": "encoder.0", "step": 2, "micro_step": 1}


def _quiet() -> Loop:
    return Loop(None, lambda: None)  # here


def _raises() -> Loop:
    return Loop(None, lambda: {}["absent"], raises=KeyError)


def _sets_globals() -> Loop:
    def run() -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        torch.distributions.Distribution.set_default_validate_args(False)

    return Loop(None, run)


HERE = _quiet.__code__.co_firstlineno + 1


def _finding(line: int = HERE, file: str = __file__, message: str = "weight is NaN", **where: Any) -> Finding:
    location = Location(**{**RIGHT, **where}, source=SourceLine(file, line))
    return Finding("NH101", "non-finite-activation", "error", "observed", "unknown", message, location)


def _reports(monkeypatch: pytest.MonkeyPatch, finding: Finding | None) -> None:
    @contextlib.contextmanager
    def trace(model: Any, optimizer: Any = None) -> Iterator[Any]:
        yield SimpleNamespace(report=lambda: SimpleNamespace(first=finding))

    monkeypatch.setattr(nanhunt, "trace", trace, raising=False)


FAULT = Scenario("bad-log", "made up", _quiet, TRUTH)
LOOK_ALIKE = Scenario("fine", "made up", _quiet, None)


def test_finding_with_every_part_right_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, _finding())
    result = score.score(FAULT)
    assert result.is_right
    assert [part.name for part in result.parts] == ["phase", "op", "module", "line", "step", "micro_step", "tensor"]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"phase": "backward"}, "phase forward -> backward"),
        ({"op": "aten::exp"}, "op log -> exp"),
        ({"op": ""}, "op log -> none"),
        ({"module": ""}, "module encoder.0 -> ''"),
        ({"line": HERE + 1}, f"line {HERE} -> {HERE + 1}"),
        ({"file": "/elsewhere/model.py"}, f"line {HERE} -> model.py:{HERE}"),
        ({"step": 3}, "step 2 -> 3"),
        ({"micro_step": 0}, "micro_step 1 -> 0"),
        ({"message": "it is NaN"}, "tensor weight -> '' in 'it is NaN'"),
    ],
)
def test_each_wrong_part_is_named(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], complaint: str) -> None:
    _reports(monkeypatch, _finding(**changed))
    result = score.score(FAULT)
    assert not result.is_right
    assert result.complaint == complaint


def test_part_on_which_the_truth_is_silent_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, _finding(op="aten::exp", module="elsewhere", step=7, micro_step=7, line=1, message=""))
    assert score.score(Scenario("any", "made up", _quiet, Truth("forward", has_line=False))).is_right


def test_missed_fault_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    assert score.score(FAULT).complaint == "missed: nothing found in forward"


def test_silence_over_a_look_alike_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    assert score.score(LOOK_ALIKE).is_right


def test_finding_over_a_look_alike_is_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, _finding())
    assert score.score(LOOK_ALIKE).complaint.startswith("false alarm: NH101 forward op=log module='encoder.0'")


def test_exception_that_the_case_names_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    assert score.score(Scenario("raises", "made up", _raises, None)).is_right


def test_any_other_exception_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    case = Scenario("fails", "made up", lambda: Loop(None, lambda: {}["absent"], raises=ValueError), None)
    assert "KeyError (test_score.py:" in score.score(case).complaint


def test_loop_that_does_not_raise_what_it_should_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    case = Scenario("ends", "made up", lambda: Loop(None, lambda: None, raises=ValueError), None)
    assert "the loop was to raise <class 'ValueError'>" in score.score(case).complaint


def test_case_leaves_no_trace_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    _reports(monkeypatch, None)
    score.score(Scenario("globals", "made up", _sets_globals, None))
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="found invalid values"):
        torch.distributions.Categorical(logits=torch.tensor([torch.nan]))


def _main(monkeypatch: pytest.MonkeyPatch, finding: Finding | None, *arguments: str) -> int:
    _reports(monkeypatch, finding)
    monkeypatch.setattr(score, "load_cases", lambda: ([FAULT, LOOK_ALIKE], []))
    return score.main(arguments)


def test_table_has_80_columns_and_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, _finding(op="aten::exp"), "--verbose") == 1
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) == 80
    assert "forward                   0 of 1      1 of 1      0 of 1      1 of 1      1 of 1\n" in printed
    assert "look-alikes               0 of 1\n" in printed
    assert "bad-log: op log -> exp\n" in printed
    assert "fine: false alarm: NH101" in printed


def test_exit_code_is_0_if_all_asked_for_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, _finding(), "--only", "bad-*") == 0
    assert "false alarms" not in capsys.readouterr().out


def test_exit_code_is_2_if_no_case_has_the_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, None, "--only", "absent") == 2
    assert capsys.readouterr().err == "no case is named absent\n"


def test_json_holds_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _main(monkeypatch, _finding(), "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"]["all faults"] == {"cases": 1, "right": 1, "phase": 1, "op": 1, "module": 1, "line": 1}
    assert [(case["name"], case["right"]) for case in printed["cases"]] == [("bad-log", True), ("fine", False)]


def test_file_that_cannot_be_imported_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_written_case.py").write_text("def case(:\n")
    monkeypatch.setattr(score, "FOLDER", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _, unreadable = score.load_cases()
    assert [result.name for result in unreadable] == ["<half_written_case.py>"]
    assert "SyntaxError" in unreadable[0].complaint
    assert not unreadable[0].is_right
