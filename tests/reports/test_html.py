"""The page, read by a parser: what stands in it, and that nothing in it is loaded or run but its own."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from nanhunt.findings import DataTable
from nanhunt.reports import html

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles; refuses what is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_everything_in_the_full_report_is_on_the_page(full_report):
    text = Page(html.render(full_report)).text
    for finding in full_report.findings:
        place = finding.location
        lines = [
            finding.code,
            finding.name,
            finding.message,
            place.module,
            *finding.notes,
            *finding.help,
            *finding.evidence,
        ]
        assert all(line in text for line in lines)
    assert "/home/ada/[runs]/detector/graph.py:118" in text
    assert full_report.findings[0].location.source.text in text
    assert all(link.what in text and link.detail in text for link in full_report.chain)
    assert all(sentence in text for sentence in full_report.verdict.sentences)
    assert all(result.title in text for result in full_report.experiments)
    assert all(f"{skip.what} {skip.reason}" in text for skip in full_report.skips)
    assert all(f"{name} {value}" in text for name, value in full_report.facts)
    assert "determinism bit-identical (loss and 74 of 74 gradients)" in text
    assert "1 error, 1 warning, 2 not done; 11 steps run in 12.3 s" in text


def test_outcomes_are_told_in_words(full_report):
    text = Page(html.render(full_report)).text
    assert "captured ✕ NON-FINITE forward ✓ backward ✕ step ✕ loss 0.1733 ✓ finite forward ✓" in text
    assert "≈ finite (mask) nan_to_num on the model's output and on all gradients mask 0 74 of 74" in text
    assert "✕ NON-FINITE (step) no weight decay" in text
    assert "\N{EN DASH} not run learning rate a tenth optimizer the target makes no optimizer" in text


def test_the_chain_has_its_shares_as_bars(full_report):
    page = Page(html.render(full_report))
    bars = [attrs["style"] for tag, attrs in page.elements if (attrs.get("style") or "").startswith("width")]
    # 0.16 % would not be seen.
    assert bars == ["width: 1.5%", "width: 33.3%", "width: 100.0%"]
    labels = [attrs["aria-label"] for tag, attrs in page.elements if attrs.get("class") == "bar"]
    assert labels == [f"{share} of the elements non-finite" for share in ("0.16 %", "33 %", "all")]


def test_the_explain_page_stands_below_its_finding(full_report):
    page = html.render(full_report)
    text = Page(page).text
    assert "the gradient of eigenvectors was taken where two eigenvalues are exactly equal" in text
    assert "The rule holds only if two of its values are equal bit for bit." in text
    assert "<code>eigh</code>" in page
    unknown = replace(full_report.findings[0], code="NH999")
    assert "nanhunt explain NH999" in Page(html.render(replace(full_report, findings=(unknown,)))).text


def test_tables_passes_and_skips_of_an_audit_are_on_the_page(audit_report):
    page = Page(html.render(audit_report))
    assert "layer gain gradient dead encoder.blocks.0.attention.out_proj 0 0e-3 False" in page.text
    assert "gain: output over input" in page.text
    assert "2 rules looked and found nothing NH101 NH203" in page.text
    assert "the schedule no schedule was given" in page.text
    numeric = [attrs for tag, attrs in page.elements if tag == "td" and attrs.get("class") == "numeric"]
    assert len(numeric) == 8


def test_of_a_very_long_table_the_page_says_what_it_leaves_out(audit_report):
    table = DataTable("long", ("n",), tuple((n,) for n in range(2500)))
    page = Page(html.render(replace(audit_report, tables=(table,))))
    assert "1,500 more rows are in the report as JSON" in page.text
    assert page.count("td") == 1000


def test_headings_go_down_one_level_at_a_time(full_report, traced_report, audit_report):
    for report in (full_report, traced_report, audit_report):
        levels = [int(tag[1]) for tag, _ in Page(html.render(report)).elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_plotting_library_is_in_pages_with_a_plot_only(full_report, traced_report):
    assert len(html.render(full_report)) < 60_000
    assert len(html.render(traced_report)) > 3_000_000


@pytest.mark.parametrize("kind", ["full_report", "traced_report", "audit_report", "hostile_report"])
def test_nothing_is_loaded_from_anywhere(kind, request):
    page = Page(html.render(request.getfixturevalue(kind)))
    loads = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping", "xlink:href"}
    assert [attrs for _, attrs in page.elements if loads & set(attrs)] == []
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "form", "img"})
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    script_sources = policy.partition("script-src ")[2].split()
    assert script_sources
    assert all(source.startswith("'sha256-") for source in script_sources)


def test_hostile_text_stays_text(hostile_report):
    page = Page(html.render(hostile_report))
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "heat-data"}, {}, {}]
    assert page.count("a") == page.count("img") == 0
    assert [name for _, attrs in page.elements for name in attrs if name.startswith("on")] == []
    assert "<script>document.documentElement.dataset.owned = 1</script>" in page.text
    assert "{{ 7 * 7 }} ${7 * 7}" in page.text
    assert all(letter.isprintable() for letter in page.text)


def test_a_name_cannot_end_the_data_of_the_plot(hostile_report):
    page = Page(html.render(hostile_report))
    heat = json.loads(page.scripts[0])
    assert heat["rows"][1] == "</script>--><script>document.documentElement.dataset.owned = 3</script><!--"


def test_the_same_report_gives_the_same_page(full_report):
    assert html.render(full_report) == html.render(full_report)


def test_a_report_without_a_finding_says_what_that_means(traced_report, full_report):
    none = replace(traced_report, findings=(), chain=(), magnitudes=None)
    assert "no operation was found to make a non-finite value that does harm" in Page(html.render(none)).text
    failed = html.render(replace(full_report, findings=()))
    assert '<p class="headline bad">the step is not finite, but no operation' in failed
