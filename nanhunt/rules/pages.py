"""The explain page of a rule, which is the docstring of its file."""

import re
from typing import NamedTuple

from nanhunt.errors import NanhuntError
from nanhunt.rules.registry import Rule, all_rules, find_own_rule

HEADINGS = (
    "What it does",
    "Why it matters",
    "Example",
    "Use instead",
    "Known limits",
    "Settings",
    "References",
)
"""What a page may have, in this order; the first two are always there."""

_HEADING = re.compile(rf"^({'|'.join(HEADINGS)}):$", re.MULTILINE)


class Page(NamedTuple):
    """A page in its parts.

    Attributes:
        summary: The fault in one sentence.
        sections: Heading and text, without indentation.
    """

    summary: str
    sections: tuple[tuple[str, str], ...]


def find_rule(code: str) -> Rule:
    """The rule with this code or name.

    Raises:
        NanhuntError: If there is none.
    """
    own = find_own_rule(code)
    if own is not None:
        return own
    for rule in all_rules():
        if code.upper() == rule.code.upper() or code == rule.name:
            return rule
    raise NanhuntError(f"no rule {code!r}", help="`nanhunt rules` lists them")


def page(rule: Rule) -> str:
    """The page as text, under the rule's code."""
    return f"{rule.code} {rule.doc or f'{rule.name}: {rule.module} has no docstring.'}"


def parts(rule: Rule) -> Page:
    """The page in its parts."""
    head, *rest = _HEADING.split(rule.doc)
    summary = head.partition(": ")[2].strip()
    texts = ["\n".join(line.removeprefix("    ") for line in text.strip("\n").splitlines()) for text in rest[1::2]]
    return Page(" ".join(summary.split()), tuple(zip(rest[::2], (text.strip() for text in texts), strict=True)))
