"""What is to be ignored: what a project says in its ``pyproject.toml``, and what the command line says."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanhunt.errors import NanhuntError, first_line
from nanhunt.findings import Report
from nanhunt.rules.pages import find_rule
from nanhunt.rules.registry import all_rules

_HELP = 'write: [tool.nanhunt] ignore = {NH402 = "summed in float32 by our kernel"}'
_PREFIX = re.compile(r"[A-Z]+[0-9]+")


def ignored_rules(given: Iterable[str] = (), folder: Path | None = None) -> dict[str, str]:
    """Why the findings of some rules are to be ignored, by rule code.

    A rule is named by its code, its name, or the beginning of its code: ``NH4`` is every rule whose code begins so.
    What is said of a rule itself, or of a longer beginning, goes before what is said of a shorter one.

    Args:
        given: ``NH402=reason``, as on the command line; goes before what the project says.
        folder: Where to look for the project's file, and upwards from there; None for the working folder.

    Raises:
        NanhuntError: If a rule is not known, a reason is missing, or the file cannot be read.
    """
    of_line = {}
    for text in given:
        word, _, reason = text.partition("=")
        if not reason.strip():
            raise NanhuntError(f"--ignore {text!r} gives no reason", help='write: --ignore NH402="the reason"')
        of_line[word.strip()] = reason.strip()
    return _by_code(_of_project(folder)) | _by_code(of_line)


def without_ignored(report: Report, reasons: Mapping[str, str]) -> Report:
    """The report without what is to be ignored, which does not say that nothing was found.

    Args:
        report: The report.
        reasons: Why, by rule code.
    """
    kept = report.ignoring(reasons)
    if report.findings and not kept.findings:
        return replace(kept, absence="what was found is ignored; see what was not done")
    return kept


def _by_code(reasons: Mapping[str, str]) -> dict[str, str]:
    """The same reasons for each rule that is meant."""
    meant = [(word, *_codes(word), reason) for word, reason in reasons.items()]
    return {code: reason for _, is_whole, codes, reason in sorted(meant, key=_how_exact) for code in codes}


def _how_exact(meant: tuple[str, bool, list[str], str]) -> tuple[bool, int]:
    word, is_whole, *_ = meant
    return is_whole, len(word)


def _codes(word: str) -> tuple[bool, list[str]]:
    """Whether one rule is named whole, and the codes that are meant."""
    start = word.upper()
    codes = [rule.code for rule in all_rules() if rule.code.upper().startswith(start)]
    if codes and start not in map(str.upper, codes) and _PREFIX.fullmatch(start):
        return False, codes
    return True, [find_rule(word).code]


def _of_project(folder: Path | None) -> Mapping[str, str]:
    file = None
    try:
        folder = folder or Path.cwd()
        file = next((place / "pyproject.toml" for place in (folder, *folder.parents) if _is_project(place)), None)
        text = file.read_text(encoding="utf-8") if file is not None else ""
        return _ignored(file, tomllib.loads(text))
    # A table may be nested deeper than the reader can follow.
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise NanhuntError(f"cannot read {file or 'the working folder'}: {reason}") from error


def _ignored(file: Path | None, data: dict[str, Any]) -> Mapping[str, str]:
    tool = data.get("tool", {})
    table = tool.get("nanhunt", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise NanhuntError(f"{file}: [tool.nanhunt] is no table", help=_HELP)
    unknown = sorted(set(table) - {"ignore"})
    if unknown:
        raise NanhuntError(f"{file}: [tool.nanhunt] has an unknown key {unknown[0]!r}", help=_HELP)
    reasons = table.get("ignore", {})
    if not isinstance(reasons, dict):
        raise NanhuntError(f"{file}: ignore in [tool.nanhunt] needs a reason for each rule", help=_HELP)
    for word, reason in reasons.items():
        if not isinstance(reason, str) or not re.search(r"\S", reason):
            raise NanhuntError(f"{file}: ignore in [tool.nanhunt] gives no reason for {word}", help=_HELP)
    return reasons


def _is_project(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file()
