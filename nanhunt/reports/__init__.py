"""Reports: findings in, text out. One format a file."""

from collections.abc import Callable

from nanhunt.findings import Report
from nanhunt.reports import console, json_report

REPORTS: dict[str, Callable[[Report], str]] = {"console": console.render, "json": json_report.render}
