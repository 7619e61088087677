"""Reports: findings in, text out. One format a file, loaded when it is asked for."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from nanhunt.errors import NanhuntError
from nanhunt.files import write_text
from nanhunt.findings import Report

_MODULES = {"console": "console", "json": "json_report", "html": "html", "github": "github", "junit": "junit"}
_SUFFIXES = {".txt": "console", ".json": "json", ".html": "html", ".htm": "html", ".xml": "junit"}


def _renderer(module: str) -> Callable[[Report], str]:
    def render(report: Report) -> str:
        text: str = import_module(f"nanhunt.reports.{module}").render(report)
        return text

    return render


REPORTS: dict[str, Callable[[Report], str]] = {name: _renderer(module) for name, module in _MODULES.items()}
"""What turns a report into text, by the name of the format."""


def format_of(file: Path) -> str:
    """The format that the name of a file asks for; plain text where it asks for none."""
    return _SUFFIXES.get(file.suffix.lower(), "console")


def save_report(report: Report, path: str | Path, form: str | None = None) -> Path:
    """Writes a report, whole or not at all.

    Args:
        report: What ``hunt.report()``, ``nanhunt.replay`` or an audit gave.
        path: Where it goes; an existing file is replaced.
        form: ``console``, ``html``, ``json``, ``github`` or ``junit``; None for what the path ends with.

    Returns:
        The path.

    Raises:
        NanhuntError: If there is no such form, or the file cannot be written.
    """
    path = Path(path)
    name = form or format_of(path)
    if name not in REPORTS:
        raise NanhuntError(f"no report format {name!r}", help=f"give one of {', '.join(REPORTS)}")
    write_text(path, REPORTS[name](report).rstrip("\n") + "\n")
    return path
