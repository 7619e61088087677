"""The report as JSON: numbers stay numbers, non-finite ones become the strings NaN, Infinity and -Infinity.

The schema is the fields of ``nanhunt.findings.Report``, written down in ``docs/report.schema.json``; ``schema_version``
counts up whenever they change.
"""

import json
import math
from dataclasses import asdict
from typing import Any

from nanhunt.findings import Report

SCHEMA_VERSION = 2


def render(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **_strict(asdict(report))}, indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    """The same data without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
