"""The report a person reads: one golden text, and what holds for any report.

``NANHUNT_BLESS=1 python -m pytest tests/reports`` writes the golden text anew; read the difference before you keep it.
"""

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nanhunt.findings import ChainLink, DataTable, Location, Report, Skip, Verdict
from nanhunt.records.ops import SourceLine
from nanhunt.records.steps import Determinism
from nanhunt.reports import console
from nanhunt.reports.words import short_path

GOLDEN = Path(__file__).parent / "golden" / "report.txt"


@pytest.fixture
def bare_report() -> Report:
    """Nothing was found and nothing could be run."""
    return Report(
        title="replay of bad_batch_000000.pt",
        facts=(),
        findings=(),
        chain=(),
        grid=(),
        experiments=(),
        baseline=None,
        determinism=Determinism("unknown"),
        verdict=Verdict("unknown", ("the step was not run",)),
    )


def test_the_full_report_reads_as_the_golden_file(full_report):
    text = console.render(full_report)
    if os.environ.get("NANHUNT_BLESS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_bare_report_says_that_nothing_was_found(bare_report):
    assert console.render(bare_report) == (
        "replay of bad_batch_000000.pt\n"
        "  determinism  unknown\n"
        "\n"
        "no operation was found to make a non-finite value that does harm\n"
        "\n"
        "verdict: unknown\n"
        "  - the step was not run\n"
        "\n"
        "no finding; 0 steps run in 0.0 s\n"
    )


def test_every_fact_of_the_report_is_in_the_text(full_report):
    text = " ".join(console.render(full_report).replace("   |", " ").split())
    for _, value in full_report.facts:
        assert value in text
    for finding in full_report.findings:
        assert f"{finding.severity}[{finding.code}]: {finding.message}" in text
        assert f"{finding.cause} ({finding.certainty})" in text
        assert f"nanhunt explain {finding.code}" in text
        assert all(words in text for words in (*finding.notes, *finding.help, *finding.evidence))
    assert all(f"{skip.what}: {skip.reason}" in text for skip in full_report.skips)
    assert all(cell.weights in text and cell.batch in text for cell in full_report.grid)
    assert full_report.determinism.detail in text
    assert "[runs]/detector/graph.py:118" in text


def test_what_is_finite_non_finite_or_not_run_is_told_without_colour(full_report):
    rows = console.render(full_report).splitlines()
    told = {
        "positional encoding detached": "finite 0.81 0/74",
        "weights and batch in float64": "NON-FINITE (backward)",
        "nan_to_num on": "finite (mask) 0 74/74",
        "sample 3 replaced": "NON-FINITE (forward)",
        "learning rate a tenth": "not run",
        "no weight decay": "NON-FINITE (step)",
    }
    for title, outcome in told.items():
        row = next(row for row in rows if title in row)
        assert " ".join(row[: row.index(title)].split()) == outcome


def test_the_note_of_a_finite_experiment_is_shown(full_report):
    noted = [replace(result, note="the gradients are still wrong") for result in full_report.experiments]
    text = console.render(replace(full_report, experiments=tuple(noted)))
    assert " ".join(text.split()).count("(the gradients are still wrong)") == 2


def test_micro_step_and_rank_are_shown_where_there_are_any(full_report):
    place = replace(full_report.findings[0].location, micro_step=2, rank=3)
    text = console.render(replace(full_report, findings=(replace(full_report.findings[0], location=place),)))
    assert "backward, step 19, micro-step 2, rank 3" in text


def assert_plain(text: str) -> None:
    for line in text.splitlines():
        assert len(line) <= 80
        assert line == line.rstrip()
        assert all(letter.isprintable() for letter in line)


def test_no_line_is_over_80_columns_ends_in_blanks_or_holds_codes(full_report, bare_report):
    assert_plain(console.render(full_report))
    assert_plain(console.render(bare_report))


def test_tables_stand_in_columns_numbers_to_the_right(audit_report):
    text = console.render(audit_report)
    assert (
        "  layer                                gain  gradient  dead\n"
        "  encoder.blocks.0.attention.out_proj     0      0e-3  False\n"
        "  encoder.blocks.1.attention.out_proj   0.5      1e-3  False\n"
    ) in text
    assert_plain(text)


def test_a_table_too_wide_for_columns_has_its_rows_one_under_the_other(audit_report):
    text = " ".join(console.render(audit_report).split())
    assert "100,000 column 1 of many 100,001, column 2 of many 100,002" in text
    assert f"column 11 of many {'x' * 30}" in text


def test_a_table_without_rows_says_so(audit_report):
    assert "\nempty\n  none\n" in console.render(audit_report)


def test_of_a_long_table_the_console_says_what_it_leaves_out(audit_report):
    table = DataTable("long", ("n",), tuple((n,) for n in range(70)))
    text = console.render(replace(audit_report, tables=(table,)))
    assert "\n  59\n  and 10 rows more, in the report as JSON (--format json)\n" in text


def test_long_words_of_a_table_are_broken_but_no_number_is(audit_report):
    table = DataTable("names", ("module", "kind", "norm"), (("layers." * 20, "x" * 40, 1.25e-7),))
    text = console.render(replace(audit_report, tables=(table,)))
    assert_plain(text)
    assert "1.25e-07" in text
    rows = text[text.index("names\n") : text.index("not done")].splitlines()[2:]
    assert "".join(row[2:].split("  ")[0] for row in rows if row) == "layers." * 20


def test_hostile_text_stays_plain(hostile_report):
    assert_plain(console.render(hostile_report))


words = st.text(st.characters(codec="ascii"), max_size=120) | st.sampled_from(
    ["[bold]x[/bold]", "[/x]", ":warning:", "\x1b[31mred", "a\tb", "C:[x]\\y", "x" * 200, "line\nline", "\x9b31m"]
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_text_from_a_file_is_shown_as_it_is_and_never_obeyed(data):
    finding_text = data.draw(words)
    report = Report(
        title=data.draw(words),
        facts=((data.draw(words), data.draw(words)),),
        findings=(),
        chain=(ChainLink(data.draw(words), data.draw(words)),) * 2,
        grid=(),
        experiments=(),
        baseline=None,
        determinism=Determinism("differs", data.draw(words)),
        verdict=Verdict("unknown", (finding_text,)),
        skips=(Skip(data.draw(words), data.draw(words)),),
    )
    assert_plain(console.render(report))


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/x]", ":warning:", "[red]"])
def test_brackets_and_colons_are_no_markup(full_report, name):
    place = Location("forward", op=name, module=f"net.{name}", source=SourceLine(f"/{name}/a.py", 3, f"y = {name}"))
    finding = replace(full_report.findings[0], location=place, message=name, evidence={name: name}, notes=(name,))
    text = console.render(replace(full_report, title=name, facts=((name, name),), findings=(finding,)))
    # Title, both sides of a fact, message, operation, module, path, line, both sides of a number, note.
    assert text.count(name) == 11


def test_with_colour_the_words_are_the_same(full_report):
    coloured = Console(file=io.StringIO(), width=console.WIDTH, force_terminal=True, color_system="truecolor")
    plain = Console(file=io.StringIO(), width=console.WIDTH, color_system=None)
    for one in (coloured, plain):
        console.print_report(full_report, one)
    text = coloured.file.getvalue()
    assert "\x1b[1;31mNON-FINITE" in text
    while "\x1b[" in text:
        start = text.index("\x1b[")
        text = text[:start] + text[text.index("m", start) + 1 :]
    assert text == plain.file.getvalue()


def test_a_narrow_terminal_breaks_lines_and_loses_nothing(full_report):
    narrow = Console(file=io.StringIO(), width=60, color_system=None)
    console.print_report(full_report, narrow)
    text = narrow.file.getvalue()
    assert "error[NH203]" in text
    assert "11 steps run in 12.3 s" in text
    assert all(len(line) <= 60 for line in text.splitlines())
    for result in full_report.experiments:
        assert all(word in text for word in f"{result.title} {result.skipped}".split())


def test_a_file_below_the_working_folder_is_shown_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "src" / "train.py")) == "src/train.py"
    assert short_path("/elsewhere/train.py") == "/elsewhere/train.py"
