"""What a project says of nanhunt in its ``pyproject.toml``."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from nanhunt.errors import NanhuntError
from nanhunt.rules.pages import find_rule

_HELP = 'write: [tool.nanhunt] ignore = {NH402 = "summed in float32 by our kernel"}'


def ignored_rules(given: Iterable[str] = (), folder: Path | None = None) -> dict[str, str]:
    """Why the findings of some rules are to be ignored, by rule code.

    Args:
        given: ``NH402=reason``, as on the command line; goes before what the project says.
        folder: Where to look for the project's file, and upwards from there; None for the working folder.

    Raises:
        NanhuntError: If a rule is not known, a reason is missing, or the file cannot be read.
    """
    reasons = {find_rule(word).code: reason for word, reason in _of_project(folder or Path.cwd()).items()}
    for text in given:
        word, _, reason = text.partition("=")
        if not reason.strip():
            raise NanhuntError(f"--ignore {text!r} gives no reason", help='write: --ignore NH402="the reason"')
        reasons[find_rule(word.strip()).code] = reason.strip()
    return reasons


def _of_project(folder: Path) -> Mapping[str, str]:
    file = next((place / "pyproject.toml" for place in (folder, *folder.parents) if _is_file(place)), None)
    if file is None:
        return {}
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NanhuntError(f"cannot read {file}: {error}") from error
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


def _is_file(place: Path) -> bool:
    return (place / "pyproject.toml").is_file()
