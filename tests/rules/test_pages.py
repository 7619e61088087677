"""The pages of the rules in ``docs/rules``: made of the docstrings, up to date, and linked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanhunt.rules import write_pages
from nanhunt.rules.registry import Judgement, Rule, all_rules

DOCS = Path(__file__).parents[2] / "docs" / "rules"
CODES = [rule.code for rule in all_rules()]
LINK = re.compile(r"\]\(([^)]+)\)")


def test_pages_are_those_that_make_docs_writes():
    texts = write_pages.pages()
    stale = [name for name, text in texts.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != text]
    assert stale == [], "run `make docs`"
    assert sorted(path.name for path in DOCS.iterdir()) == sorted(texts)


def test_every_rule_has_a_page_and_a_row():
    texts = write_pages.pages()
    assert sorted(texts) == sorted(["README.md", *(f"{code}.md" for code in CODES)])
    rows = re.findall(r"^\| \[(NH[0-9]{3})\]\(\1\.md\) \| ([a-z0-9-]+) \|", texts["README.md"], flags=re.MULTILINE)
    assert rows == [(rule.code, rule.name) for rule in all_rules()]


@pytest.mark.parametrize("name", ["README.md", *(f"{code}.md" for code in CODES)])
def test_links_lead_somewhere(name):
    targets = LINK.findall((DOCS / name).read_text())
    assert targets
    assert all((DOCS / target).is_file() for target in targets if not target.startswith("https://"))


def test_the_readme_links_the_pages():
    readme = (DOCS.parents[1] / "README.md").read_text()
    assert "](docs/rules/README.md)" in readme


def test_page_says_what_the_docstring_says():
    text = write_pages.pages()["NH203.md"]
    assert text.startswith("# NH203 eigenvector-gradient-at-tie\n\n*error, stable; cause: eigenvector-gradient-at-tied")
    assert "\n\nThe gradient of eigenvectors was taken where two eigenvalues are exactly equal.\n" in text
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        "What it does",
        "Why it matters",
        "Example",
        "Use instead",
        "Known limits",
        "References",
    ]
    assert "\nLooks at the spectrum of the matrix at which" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_what_markdown_would_take_for_html_is_escaped(monkeypatch):
    body = "    ``<x>`` and <y>\n\n        if a < b:\n"
    doc = f"a-fault: less | than <b>.\n\nWhat it does:\n{body}\nWhy it matters:\n    It does."
    monkeypatch.setattr(sys.modules[__name__], "__doc__", doc)
    rule = Rule("NH999", "a-fault", "a-cause", lambda record: Judgement("seen"), status="preview")
    monkeypatch.setattr(write_pages, "own_rules", lambda: (rule,))
    texts = write_pages.pages()
    assert "Less | than \\<b>.\n" in texts["NH999.md"]
    assert "\n``<x>`` and \\<y>\n\n    if a < b:\n" in texts["NH999.md"]
    assert "| [NH999](NH999.md) | a-fault | error, preview | Less \\| than \\<b>. |\n" in texts["README.md"]


def test_rules_of_other_packages_get_no_page_here(monkeypatch):
    monkeypatch.setattr(write_pages, "all_rules", lambda: (Rule("ACME1", "a", "b", lambda record: None), *all_rules()))
    assert [rule.code for rule in write_pages.own_rules()] == CODES


def test_pages_are_written_and_those_of_rules_that_went_are_taken_away(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "NH998.md").write_text("of a rule that is gone\n")
    (folder / "mine.md").write_text("not a rule's\n")
    command = [sys.executable, "-m", "nanhunt.rules.write_pages"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*write_pages.pages(), "mine.md"])
    assert (folder / "NH203.md").read_text() == write_pages.pages()["NH203.md"]

    (tmp_path / "file").write_text("")
    done = subprocess.run([*command, str(tmp_path / "file" / "docs")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nanhunt: cannot write ")
    assert done.stderr.count("\n") == 1


def test_misuse_is_one_line():
    done = subprocess.run([sys.executable, "-m", "nanhunt.rules.write_pages"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: python -m nanhunt.rules.write_pages FOLDER\n")


def test_one_page_loads_one_rule():
    lines = [
        "import sys",
        "from nanhunt.rules.pages import find_rule",
        "print(find_rule('lost-update').code, find_rule('nh501').code)",
        "print(sorted(name.rpartition('.')[2] for name in sys.modules if name.startswith('nanhunt.rules.nh')))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["NH304 NH501", "['nh304_lost_update', 'nh501_log_of_nonpositive']"]
