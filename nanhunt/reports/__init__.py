"""Reports: findings in, text out. One format a file."""

from collections.abc import Callable
from pathlib import Path

from nanhunt.findings import Report
from nanhunt.reports import console, json_report

REPORTS: dict[str, Callable[[Report], str]] = {"console": console.render, "json": json_report.render}

_SUFFIXES = {console.SUFFIX: "console", json_report.SUFFIX: "json"}


def format_of(file: Path) -> str:
    """The format that the name of a file asks for; plain text where it asks for none."""
    return _SUFFIXES.get(file.suffix.lower(), "console")
