"""What the sentinel saw of a script, as a report, and where reports go.

A report goes to standard error, for standard output is the script's own and may be piped; a program takes it from the
file that ``--report`` or ``--json`` names.
"""

import contextlib
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from nanhunt.capture.watch import Fault
from nanhunt.files import write_text
from nanhunt.findings import Finding, Location, Report, Skip, Verdict
from nanhunt.hunt import rank
from nanhunt.reports import console as console_report
from nanhunt.script.sentinel import Found, Sentinel

Render = Callable[[Report], str]

_IGNORED = "ignored: "
_WIDTH = 100
_MANY_STEPS = 8
_EVERY_STEP, _SCRIPT = "every step", "looking at the script"
_RULES = {"forward": ("NH101", "non-finite-activation"), "backward": ("NH201", "non-finite-gradient")}


def num_ranks() -> int:
    """Processes of the distributed run that a launcher such as torchrun has started; 1 outside."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def titled(report: Report, command: Sequence[str]) -> Report:
    """The report with the script as its user named it over it, and the process where there are several."""
    name = " ".join(command[:2] if command[0] == "-m" else command[:1])
    where = f" on rank {rank()} of {num_ranks()}" if num_ranks() > 1 else ""
    return replace(report, title=f"{name}{where}")


def report_of_trace(report: Report, command: Sequence[str]) -> Report:
    """The exact tracer's report of a script."""
    if ("operations", "0") in report.facts:
        report = replace(report, skips=(*report.skips, Skip(_EVERY_STEP, "no operation of torch was run")))
    return titled(report, command)


def own_path(path: Path) -> Path:
    """The path for this process: in a distributed run each has its own, so that files do not clash."""
    return path.with_name(f"{path.stem}.rank{rank()}{path.suffix}") if num_ranks() > 1 else path


def own_folder(folder: Path) -> Path:
    """The folder for this process."""
    return folder / f"rank{rank()}" if num_ranks() > 1 else folder


def is_unseen(report: Report) -> bool:
    """Whether nothing of the script was looked at, so that the report says nothing of it."""
    return any(skip.what == _EVERY_STEP for skip in report.skips)


def publish(
    report: Report,
    *,
    is_clean_end: bool,
    files: Mapping[Path, Render] = MappingProxyType({}),
    render: Render | None = None,
) -> None:
    """Prints the report if it has something to say, and writes it where a program wants it.

    Args:
        report: The report.
        is_clean_end: Whether the script itself ended well, so that silence would be taken for a clean bill.
        files: Where it is written, and what makes the text.
        render: Makes the text that is printed, whether or not anything was found; None for that of a terminal.

    Raises:
        NanhuntError: If a file cannot be written, or the text cannot be made.
    """
    if render is not None:
        say(render(report))
    else:
        _say_console(report, is_clean_end=is_clean_end)
    for file, text_of in files.items():
        write_text(own_path(file), text_of(report))


def _say_console(report: Report, *, is_clean_end: bool) -> None:
    if not report.findings:
        for skip in report.skips:
            is_ignored = skip.reason.startswith(_IGNORED)
            if is_ignored or (is_clean_end and skip.what in (_EVERY_STEP, _SCRIPT)):
                say(f"nanhunt: {'' if is_ignored else 'not done: '}{skip.what}: {skip.reason}\n")
        return
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    console = Console(file=io.StringIO(), width=_WIDTH, force_terminal=is_terminal, highlight=False)
    console_report.print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    say(f"\n{console.file.getvalue()}")


def say(text: str) -> None:
    """Writes to standard error at one go, so that the reports of several processes stay whole."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


def report_of(sentinel: Sentinel, command: Sequence[str], seconds: float) -> Report:
    """The first fault of every optimizer as a finding, with the commands to run next.

    Args:
        sentinel: What watched the script.
        command: The script and its arguments.
        seconds: How long it ran.
    """
    firsts = [(found, found.faults[0]) for found in sentinel.found if found.faults]
    skips = [Skip(_SCRIPT, problem) for problem in dict.fromkeys(sentinel.problems)]
    if not sentinel.found:
        skips.append(Skip(_EVERY_STEP, "no step of a torch optimizer was seen"))
    sentences = ("no step was non-finite",)
    if firsts:
        sentences = ("the step and the module were observed; --exact names the operation and the line",)
    report = Report(
        title="",
        facts=tuple(_facts(sentinel)),
        findings=tuple(_finding(found, fault, command) for found, fault in firsts),
        chain=(),
        verdict=Verdict("unknown" if firsts else "observed", sentences),
        skips=tuple(skips),
        seconds=seconds,
    )
    return titled(report, command)


def _facts(sentinel: Sentinel) -> Iterator[tuple[str, str]]:
    models = dict.fromkeys(found.model for found in sentinel.found if found.model)
    if models:
        yield "model", ", ".join(models)
    yield "steps", f"{sentinel.num_steps:,}"
    faults = [fault for _, fault in sentinel.faults]
    if len(faults) > 1:
        steps = ", ".join(str(fault.step) for fault in faults[:_MANY_STEPS])
        yield "non-finite steps", f"{steps}{', and more' if len(faults) > _MANY_STEPS else ''}"


def _finding(found: Found, fault: Fault, command: Sequence[str]) -> Finding:
    phase, module, notes = _place(found, fault)
    code, name = _RULES[phase]
    return Finding(
        code=code,
        name=name,
        severity="error",
        certainty="unknown",
        cause="unknown",
        message=fault.message,
        location=Location(phase, module=module, step=fault.step, rank=rank()),
        evidence=_evidence(found, fault),
        notes=(*notes, f"saved as {fault.capture}" if fault.capture else f"not saved: {fault.problem}"),
        help=tuple(_next(found, fault, command)),
    )


def _place(found: Found, fault: Fault) -> tuple[str, str, list[str]]:
    """Phase and module, as far as hooks can tell, and what is to be said of it."""
    seen, has_finite_loss = fault.module_fault, math.isfinite(fault.loss)
    if seen is None:
        return ("backward" if has_finite_loss and not fault.crash else "forward"), "", []
    if seen.phase == "backward" and not has_finite_loss and not fault.crash:
        # What made the loss is in no module: all of them gave finite values.
        return "forward", "", [seen.message]
    seen = replace(seen, modules=tuple(_joined(found.path, name) for name in seen.modules))
    return seen.phase, " or ".join(seen.modules), [seen.message]


def _evidence(found: Found, fault: Fault) -> dict[str, Any]:
    if fault.crash:
        return {}
    seen = fault.gradients
    counted = {"loss": fault.loss, "gradients_nonfinite": seen.tensors, "num_gradients": seen.num_tensors}
    return counted | ({"first_gradient": _joined(found.path, seen.first)} if seen.first else {})


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _next(found: Found, fault: Fault, command: Sequence[str]) -> Iterator[str]:
    exact = f"nanhunt run --exact {shlex.join(command)}"
    if num_ranks() > 1:
        yield f"for the operation and the line, with the same launcher: -m {exact}"
    else:
        yield f"for the operation and the line: {exact}"
    if fault.capture:
        file = shlex.quote(str(fault.capture))
        yield f"for that step alone: nanhunt replay {file} --target {_target(found, command)}"


def _target(found: Found, command: Sequence[str]) -> str:
    """What builds the model, as far as the script tells; else a name to put one's own in the place of."""
    module, _, kind = found.target.partition(":")
    if module == "__main__":
        is_here = command[0] != "-m" and Path(command[0]).resolve().parent == Path.cwd()
        module = command[1] if command[0] == "-m" else Path(command[0]).stem if is_here else ""
    return f"{module}:{kind}" if module else "mymodel:target"
