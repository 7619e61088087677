"""A script under the sentinel or the exact tracer, from its first line to its exit code."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanhunt.capture.watch import OnFault
from nanhunt.errors import NanhuntError, NonFiniteStep
from nanhunt.findings import Report, Severity
from nanhunt.hunt import trace
from nanhunt.script.program import Program, exit_code_of, load_module, load_script, show_ending
from nanhunt.script.report import (
    Render,
    is_unseen,
    num_ranks,
    own_folder,
    publish,
    report_of,
    report_of_trace,
)
from nanhunt.script.sentinel import Sentinel
from nanhunt.settings import without_ignored

CANNOT_BE_TESTED = 125
"""What ``git bisect run`` takes for a commit that can be called neither good nor bad."""


@dataclass(frozen=True)
class Settings:
    """How a script is run.

    Attributes:
        is_module: Whether it is named as for ``python -m``.
        is_exact: Whether every operation is traced, in place of the sentinel.
        out_dir: Folder of the captures.
        on_fault: What the sentinel does at a fault.
        max_captures: Captures written at most.
        files: Where the report is written, and what makes the text.
        render: Makes the text that is printed; None for that of a terminal, where something was found.
        ignored: Why findings are ignored, by rule code.
        fail_on: Severities of findings that make the exit code 1.
        is_bisecting: Whether an exit code above 0 that is no finding's is to say "cannot be tested".
    """

    is_module: bool = False
    is_exact: bool = False
    out_dir: Path = Path("debug")
    on_fault: OnFault = "raise"
    max_captures: int = 20
    files: Mapping[Path, Render] = field(default_factory=dict)
    render: Render | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    fail_on: tuple[Severity, ...] = ("error",)
    is_bisecting: bool = False


def run_script(command: Sequence[str], settings: Settings) -> int:
    """Runs the script, reports what was found, and gives the exit code.

    Args:
        command: The script or module, and its arguments.
        settings: How.

    Raises:
        NanhuntError: If there is no such script, or a report cannot be written.
    """
    # The command line's own hook would stand before what the script's user sees of an error.
    sys.excepthook = sys.__excepthook__
    streams, process = (sys.stdout, sys.stderr), os.getpid()
    report, error = _run(command, settings)
    # A process that the script has forked reports nothing.
    is_parent = os.getpid() == process
    report = without_ignored(report, settings.ignored) if report is not None and is_parent else None
    severities = {found.severity for found in report.findings} if report is not None else set()
    if error is not None and not ("error" in severities and isinstance(error, NonFiniteStep)):
        show_ending(error)
    # What the script has put in their place is its own.
    sys.stdout, sys.stderr = streams
    if report is not None:
        publish(report, is_clean_end=exit_code_of(error) == 0, files=settings.files, render=settings.render)
    if num_ranks() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if severities.intersection(settings.fail_on):
        return 1
    return _bisected(report, exit_code_of(error)) if settings.is_bisecting else exit_code_of(error)


def _bisected(report: Report | None, code: int) -> int:
    """The exit code for ``git bisect run``, to which it must not seem that a script that failed has been tested."""
    is_tested = code == 0 and report is not None and not is_unseen(report)
    return code if is_tested or code >= 128 else CANNOT_BE_TESTED


def _run(command: Sequence[str], settings: Settings) -> tuple[Report | None, BaseException | None]:
    """The report, and what the script ended with; no report where it could not even be started."""
    load: Callable[[str, Sequence[str]], Program] = load_module if settings.is_module else load_script
    try:
        program = load(command[0], command[1:])
    except NanhuntError:
        raise
    except BaseException as error:  # noqa: BLE001 - a package that is imported on the way may raise anything
        return None, error
    if settings.is_exact:
        hunt = trace()
        ended = _ending(program, hunt)
        return report_of_trace(hunt.report(), program.command), ended
    sentinel = Sentinel(own_folder(settings.out_dir), settings.on_fault, settings.max_captures)
    started = time.perf_counter()
    ended = _ending(program, sentinel)
    return report_of(sentinel, program.command, time.perf_counter() - started), ended


def _ending(program: Program, tool: AbstractContextManager[Any]) -> BaseException | None:
    try:
        with tool:
            program.execute()
    except BaseException as error:  # noqa: BLE001 - however the script ends, there is a report
        return error
    finally:
        if num_ranks() > 1:
            # A launcher ends all processes when the first has ended; each is to finish its report.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return None
