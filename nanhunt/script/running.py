"""A script under the sentinel or the exact tracer, from its first line to its exit code."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanhunt.capture.watch import OnFault
from nanhunt.errors import NanhuntError, NonFiniteStep
from nanhunt.findings import Report
from nanhunt.hunt import trace
from nanhunt.script.program import Program, exit_code_of, load_module, load_script, show_ending
from nanhunt.script.report import num_ranks, own_folder, publish, report_of, report_of_trace
from nanhunt.script.sentinel import Sentinel


@dataclass(frozen=True)
class Settings:
    """How a script is run.

    Attributes:
        is_module: Whether it is named as for ``python -m``.
        is_exact: Whether every operation is traced, in place of the sentinel.
        out_dir: Folder of the captures.
        on_fault: What the sentinel does at a fault.
        max_captures: Captures written at most.
        json_file: Where the report goes as JSON.
        fails_on_fault: Whether a fault makes the exit code 1.
    """

    is_module: bool = False
    is_exact: bool = False
    out_dir: Path = Path("debug")
    on_fault: OnFault = "raise"
    max_captures: int = 20
    json_file: Path | None = None
    fails_on_fault: bool = True


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
    is_child = os.getpid() != process
    has_fault = report is not None and any(found.severity == "error" for found in report.findings) and not is_child
    if error is not None and not (has_fault and isinstance(error, NonFiniteStep)):
        show_ending(error)
    # What the script has put in their place is its own.
    sys.stdout, sys.stderr = streams
    if report is not None and not is_child:
        publish(report, settings.json_file, is_clean_end=exit_code_of(error) == 0)
    if num_ranks() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 1 if has_fault and settings.fails_on_fault else exit_code_of(error)


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
