"""Writes the pages of the rules as Markdown: ``python -m nanhunt.rules.write_pages docs/rules``, or ``make docs``."""

import re
import sys
from pathlib import Path

from nanhunt.errors import NanhuntError
from nanhunt.files import write_text
from nanhunt.rules.pages import parts
from nanhunt.rules.registry import Rule, all_rules

_GROUPS = {
    "NH0": "Environment",
    "NH1": "Forward pass",
    "NH2": "Backward pass",
    "NH3": "Optimizer",
    "NH4": "Number formats and loss scaling",
    "NH5": "Loss",
    "NH6": "Data",
    "NH7": "Parameters and initialisation",
    "NH8": "Determinism and replay",
    "NH9": "nanhunt itself",
}
_OWN_PAGE = re.compile(r"NH[0-9]{3}\.md")
_CODE = re.compile(r"(``[^`]*``)")
_HEAD = """\
# Rules

One page for each rule, made of the docstring of its file by `make docs`; `nanhunt explain NH203` prints the same.
`nanhunt rules` lists the rules that are installed, those of other packages included.

An error makes values wrong or lost; a warning is worth a look before it does. A rule is ignored with a reason, by its
code, its name, or the beginning of its code: `--ignore NH304="the schedule ends at 0"`, or in `pyproject.toml`

```toml
[tool.nanhunt]
ignore = {NH304 = "the schedule ends at 0"}
```

What is ignored is still listed, with the reason, under "not done".
"""


def own_rules() -> tuple[Rule, ...]:
    """The rules of this folder, without those of other packages."""
    return tuple(rule for rule in all_rules() if rule.module.startswith("nanhunt.rules."))


def pages() -> dict[str, str]:
    """The text of every page and of the list of them, by the name of its file."""
    rules = own_rules()
    return {"README.md": _index(rules)} | {f"{rule.code}.md": _page(rule) for rule in rules}


def write_pages(folder: Path) -> None:
    """Writes the pages, and takes away those of rules that are no longer there.

    Raises:
        NanhuntError: If a page cannot be written.
    """
    texts = pages()
    for name, text in texts.items():
        write_text(folder / name, text)
    for file in folder.iterdir():
        if _OWN_PAGE.fullmatch(file.name) and file.name not in texts:
            file.unlink()


def _page(rule: Rule) -> str:
    """One page."""
    summary, sections = parts(rule)
    source = f"nanhunt/rules/{rule.module.rpartition('.')[2]}.py"
    kinds = f"*{rule.severity}, {rule.status}; cause: {rule.cause}*"
    bodies = [f"## {heading}\n\n{_markdown(text)}" for heading, text in sections]
    last = f"[All rules](README.md) · [{source}](../../{source})"
    blocks = [f"# {rule.code} {rule.name}", kinds, _markdown(_sentence(summary)), *bodies, "---", last]
    return "\n\n".join(blocks) + "\n"


def _markdown(text: str) -> str:
    """The text of a docstring, which is Markdown but for what it would take for HTML."""
    return "\n".join(line if line.startswith("    ") else _without_tags(line) for line in text.splitlines())


def _without_tags(line: str) -> str:
    pieces = enumerate(_CODE.split(line))
    return "".join(piece if number % 2 else piece.replace("<", r"\<") for number, piece in pieces)


def _index(rules: tuple[Rule, ...]) -> str:
    lines = [_HEAD]
    for start, title in _GROUPS.items():
        group = [rule for rule in rules if rule.code.startswith(start)]
        if group:
            lines += [f"## {start}xx {title}\n", "| rule | name | severity | what is wrong |", "|---|---|---|---|"]
            lines += [_row(rule) for rule in group]
            lines.append("")
    return "\n".join(lines)


def _row(rule: Rule) -> str:
    status = "" if rule.status == "stable" else f", {rule.status}"
    summary = _markdown(_sentence(parts(rule).summary)).replace("|", r"\|")
    return f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity}{status} | {summary} |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def main() -> None:
    """Writes the pages into the folder that is named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nanhunt.rules.write_pages FOLDER")
    try:
        write_pages(Path(sys.argv[1]))
    except NanhuntError as error:
        sys.exit(f"nanhunt: {error}")


if __name__ == "__main__":
    main()
