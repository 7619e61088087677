"""Reports: findings in, text out. One format a file, loaded when it is asked for."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

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
