"""The explain page of a rule as HTML: paragraphs, lists, blocks of code."""

import re
from collections.abc import Iterator

from markupsafe import Markup

from nanhunt.errors import NanhuntError
from nanhunt.reports.words import printable
from nanhunt.rules.pages import find_rule, parts

_CODE = re.compile(r"``(.+?)``")


def explained(code: str) -> Markup:
    """The page of this rule; empty where the rule is not installed here."""
    try:
        page = parts(find_rule(code))
    except NanhuntError:
        return Markup()
    sections = (
        Markup("<h4>{}</h4>{}").format(heading, Markup().join(_blocks(text))) for heading, text in page.sections
    )
    return Markup("<p>{}</p>{}").format(_inline(page.summary), Markup().join(sections))


def _blocks(text: str) -> Iterator[Markup]:
    """Text between blank lines: code where all of it is indented, a list where it begins with ``- ``."""
    for block in re.split(r"\n\s*\n", text):
        lines = [printable(line) for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        if all(line.startswith("    ") for line in lines):
            yield Markup("<pre>{}</pre>").format("\n".join(line[4:] for line in lines))
        elif lines[0].startswith("- "):
            items = " ".join(line.strip() if not line.startswith("- ") else f"\0{line[2:]}" for line in lines)
            listed = (Markup("<li>{}</li>").format(_inline(item.strip())) for item in items.split("\0")[1:])
            yield Markup("<ul>{}</ul>").format(Markup().join(listed))
        else:
            yield Markup("<p>{}</p>").format(_inline(" ".join(line.strip() for line in lines)))


def _inline(text: str) -> Markup:
    """The text with what stands between double backticks as code."""
    pieces = _CODE.split(text)
    marked = (Markup("<code>{}</code>" if number % 2 else "{}").format(piece) for number, piece in enumerate(pieces))
    return Markup().join(marked)
