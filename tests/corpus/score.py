"""Scores ``nanhunt.trace`` over the corpus: every part of every location, and silence where nothing is wrong.

``python tests/corpus/score.py [--only NAME] [--verbose] [--json]``; the exit code is 1 if any case is wrong.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import scenario
import torch
from scenario import Loop, Scenario, Truth

import nanhunt

FOLDER = Path(__file__).resolve().parent
WIDTH = 80
PHASES = ("forward", "backward", "optimizer", "data", "weights")
SHOWN_PARTS = ("phase", "op", "module", "line")


@dataclass(frozen=True)
class Part:
    """One part of a location: what is true, what was found."""

    name: str
    expected: str
    found: str
    is_right: bool


@dataclass(frozen=True)
class Result:
    """What the tracer made of one case.

    Attributes:
        name: Name of the case.
        file: Name of its file, without the suffix.
        phase: The true phase; '' for a look-alike.
        parts: The parts on which the truth says something; empty where no finding could be compared.
        found: The first finding in one line; '' where there is none.
        error: Why the case could not be scored; '' if it could.
        seconds: Wall time.
    """

    name: str
    file: str
    phase: str
    parts: tuple[Part, ...] = ()
    found: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong in the case."""
        return bool(self.phase)

    @property
    def is_file(self) -> bool:
        """Whether this stands for a whole file that cannot be imported."""
        return self.name.startswith("<")

    @property
    def is_right(self) -> bool:
        """Whether the tracer said what is true, and nothing else."""
        if self.error:
            return False
        if self.is_fault:
            return bool(self.parts) and all(part.is_right for part in self.parts)
        return not self.found

    def part(self, name: str) -> Part | None:
        """The part of this name, if the truth says something on it and a finding was compared with it."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def complaint(self) -> str:
        """What is wrong, expected against found; '' if nothing is."""
        if self.is_right:
            return ""
        if self.error:
            return self.error
        if not self.is_fault:
            return f"false alarm: {self.found}"
        if not self.parts:
            return f"missed: nothing found in {self.phase}"
        return "; ".join(f"{p.name} {p.expected} -> {p.found}" for p in self.parts if not p.is_right)


def load_cases() -> tuple[list[Scenario], list[Result]]:
    """Imports every case module of the folder; the cases by file and line, and the files that cannot be imported."""
    broken = []
    for path in sorted(FOLDER.glob("*.py")):
        if path.name in ("scenario.py", "score.py") or path.name.startswith("test_"):
            continue
        try:
            import_module(path.stem)
        except Exception as error:  # noqa: BLE001 - one file that cannot be read must not hide the others
            broken.append(Result(f"<{path.name}>", path.stem, "", error=_in_one_line(error)))
    cases = sorted([*scenario.FAULTS, *scenario.HARMLESS], key=lambda case: (Path(case.file).name, _first_line(case)))
    return cases, broken


def _first_line(case: Scenario) -> int:
    return case.build.__code__.co_firstlineno


def _in_one_line(error: BaseException) -> str:
    """The error and the innermost place it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Runs a case in a known state of torch, and leaves no trace of it for the next one."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    grad, anomaly = torch.is_grad_enabled(), torch.is_anomaly_enabled()
    deterministic, autocast = torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    _validate_distributions()
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is one of those a loop can draw from
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_autocast_enabled("cpu", autocast)
        _validate_distributions()
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()


def _validate_distributions() -> None:
    """Undoes what compiling does: torch._dynamo switches the checks of torch.distributions off for good."""
    torch.distributions.Distribution.set_default_validate_args(True)


def score(case: Scenario) -> Result:
    """Traces one case and compares the first finding with the truth."""
    result = Result(case.name, Path(case.file).stem, case.truth.phase if case.truth else "")
    start = time.perf_counter()
    try:
        with isolated(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            line = case.line
            finding = _trace(case.build())
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in one case is shown as the result of that case
        return replace(result, error=_in_one_line(error), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    if finding is None:
        return replace(result, seconds=seconds)
    parts = () if case.truth is None else tuple(compare(case.truth, Path(case.file), line, finding))
    return replace(result, parts=parts, found=one_line(finding), seconds=seconds)


class _UnexpectedEnd(Exception):
    """A loop that ended by itself although its case says that it raises."""


def _trace(loop: Loop) -> Any:
    """The first finding of the loop's report, or None."""
    raised = None
    try:
        with nanhunt.trace(loop.model, optimizer=loop.optimizer, **loop.options) as hunt:
            loop.run()
    except Exception as error:
        if loop.raises is None or not isinstance(error, loop.raises):
            raise
        raised = error
    if loop.raises is not None and raised is None:
        raise _UnexpectedEnd(f"the loop was to raise {loop.raises}")
    return hunt.report().first


def compare(truth: Truth, file: Path, line: int | None, finding: Any) -> Iterator[Part]:
    """The parts of the location on which the truth says something."""
    where = finding.location
    yield _same("phase", truth.phase, where.phase)
    if truth.op is not scenario.ANY:
        yield Part("op", _or(_short(op) for op in truth.op), _short(where.op) or "none", where.op in truth.op)
    if truth.module is not scenario.ANY:
        yield _same("module", truth.module, where.module)
    if line is not None:
        yield _compare_line(file, line, where.source)
    if truth.step is not scenario.ANY:
        yield _same("step", truth.step, where.step)
    if truth.micro_step is not scenario.ANY:
        yield _same("micro_step", truth.micro_step, where.micro_step)
    if truth.tensor:
        tensor = getattr(where, "tensor", "")
        shown = f"'{tensor}' in '{finding.message}'"
        yield Part("tensor", truth.tensor, shown, truth.tensor in tensor or truth.tensor in finding.message)


def _same(name: str, expected: object, found: object) -> Part:
    return Part(name, "''" if expected == "" else str(expected), "''" if found == "" else str(found), expected == found)


def _compare_line(file: Path, line: int, source: Any) -> Part:
    if source is None:
        return Part("line", str(line), "none", False)
    is_same_file = Path(source.file).resolve() == file.resolve()
    found = str(source.line) if is_same_file else f"{Path(source.file).name}:{source.line}"
    return Part("line", str(line), found, is_same_file and source.line == line)


def _short(op: str) -> str:
    return op.removeprefix("aten::")


def _or(names: Iterable[str]) -> str:
    return "|".join(names)


def one_line(finding: Any) -> str:
    """The finding with everything that is compared."""
    where = finding.location
    place = f"{Path(where.source.file).name}:{where.source.line}" if where.source else "no line"
    tensor = getattr(where, "tensor", "")
    return " ".join(
        [
            f"{finding.code} {where.phase}",
            f"op={_short(where.op) or 'none'}",
            f"module='{where.module}'",
            place,
            f"step={where.step}.{where.micro_step}",
            *([f"tensor={tensor}"] if tensor else []),
            f"({finding.message})",
        ]
    )


def summary(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Per phase, over all faults and over the look-alikes: cases, and right ones, whole and by part."""
    faults = [result for result in results if result.is_fault]
    groups = {phase: [result for result in faults if result.phase == phase] for phase in PHASES}
    return {
        **{phase: _counts(group) for phase, group in groups.items()},
        "all faults": _counts(faults),
        "look-alikes": _counts([result for result in results if not result.is_fault and not result.is_file]),
    }


def _counts(results: Sequence[Result]) -> dict[str, int]:
    parts = {
        name: sum(1 for result in results if (part := result.part(name)) is not None and part.is_right)
        for name in SHOWN_PARTS
    }
    return {"cases": len(results), "right": sum(result.is_right for result in results), **parts}


def asked(results: Sequence[Result], cases: Sequence[Scenario], phase: str, part: str) -> int:
    """Of how many cases a part of the truth is known."""
    shown = {result.name for result in results if result.is_fault and phase in (result.phase, "all faults")}
    return sum(1 for case in cases if case.name in shown and case.truth is not None and _says(case.truth, part))


def _says(truth: Truth, part: str) -> bool:
    return truth.has_line if part == "line" else getattr(truth, part) is not scenario.ANY


def table(results: Sequence[Result], cases: Sequence[Scenario], *, verbose: bool = False) -> str:
    """The result in 80 columns."""
    rows = [f"{'phase of the fault':<20}" + "".join(f"{name:>12}" for name in ("right", *SHOWN_PARTS))]
    for phase, counts in summary(results).items():
        cells = [f"{counts['right']} of {counts['cases']}"]
        if phase != "look-alikes":
            cells += [f"{counts[part]} of {asked(results, cases, phase, part)}" for part in SHOWN_PARTS]
        rows.append(f"{phase:<20}" + "".join(f"{cell:>12}" for cell in cells))
    wrong = [result for result in results if not result.is_right]
    missed = [result for result in wrong if result.is_fault or result.error]
    alarms = [result for result in wrong if not result.is_fault and not result.error]
    rows += _section("wrong (expected -> found)", missed) + _section("false alarms", alarms)
    if verbose:
        rows += ["", f"{'found ':-<{WIDTH}}"]
        for result in results:
            rows += _wrapped(f"{result.name}: {result.found or result.error or 'nothing'} [{result.seconds:.1f} s]")
    return "\n".join(rows)


def _section(title: str, results: Sequence[Result]) -> list[str]:
    lines = [line for result in results for line in _wrapped(f"{result.name}: {result.complaint}")]
    return ["", f"{f'{title}: {len(results)} ':-<{WIDTH}}", *lines] if results else []


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def as_json(results: Sequence[Result]) -> str:
    """Everything as one JSON object."""
    cases = [{**asdict(result), "right": result.is_right, "complaint": result.complaint} for result in results]
    return json.dumps({"summary": summary(results), "cases": cases}, indent=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores the corpus; 0 if every case is right, 1 if any is wrong, 2 if no case has the given name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a case, a pattern such as 'adam-*', or a file; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--verbose", action="store_true", help="print the finding of every case")
    options = parser.parse_args(arguments)
    cases, results = load_cases()
    if options.only:
        cases = [case for case in cases if _is_asked(case, options.only)]
        results = [result for result in results if result.file in options.only]
        if not cases and not results:
            sys.stderr.write(f"no case is named {' or '.join(options.only)}\n")
            return 2
    for number, case in enumerate(cases, 1):
        _show_progress(number, len(cases), case.name)
        results.append(score(case))
    _show_progress(0, 0, "")
    sys.stdout.write((as_json(results) if options.json else table(results, cases, verbose=options.verbose)) + "\n")
    return 0 if all(result.is_right for result in results) else 1


def _is_asked(case: Scenario, patterns: Iterable[str]) -> bool:
    names = (case.name, case.build.__name__, Path(case.file).stem, Path(case.file).name)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _show_progress(number: int, total: int, name: str) -> None:
    """One line that is overwritten on a terminal; every 25th case elsewhere."""
    text = f"{number}/{total} {name}"[: WIDTH - 1] if total else ""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:<{WIDTH - 1}}" + ("" if total else "\r"))
        sys.stderr.flush()
    elif number % 25 == 1 or (total and number == total):
        sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
