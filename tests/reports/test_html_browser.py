"""The page in a browser: Chromium, headless, without a network, from a file."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import PROGRAM, Chromium

from nanhunt.findings import Magnitudes, Report
from nanhunt.reports import html

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed (Debian: apt-get install chromium)")

DARK, LIGHT = "rgb(19, 21, 24)", "rgb(251, 251, 250)"


@pytest.fixture(scope="module")
def browser_process():
    with Chromium(timeout_s=120) as browser:
        yield browser


@pytest.fixture
def browser(browser_process):
    browser_process.events.clear()
    browser_process.emulate()
    return browser_process


def written(report: Report, tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(html.render(report), encoding="utf-8")
    return file


def overflow(browser: Chromium) -> list[str]:
    """Elements that stick out of the page to the right, those inside a picture or a box that scrolls left out."""
    return browser.value(
        """[...document.querySelectorAll("body *")]
        .filter((one) => !one.closest(".scroll") && !one.ownerSVGElement)
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)
        .map((one) => one.tagName + "." + one.className)"""
    )


@pytest.mark.parametrize("kind", ["full_report", "traced_report", "audit_report", "hostile_report"])
def test_the_page_opens_from_a_file_without_a_request_or_a_complaint(kind, browser, request, tmp_path):
    file = written(request.getfixturevalue(kind), tmp_path)
    browser.open(file)
    assert browser.requests() == [file.as_uri()]
    assert browser.problems() == []


def test_hostile_text_runs_nothing(browser, hostile_report, tmp_path):
    browser.open(written(hostile_report, tmp_path))
    assert browser.value("document.documentElement.dataset.owned") is None
    assert browser.value("document.querySelectorAll('a, img, main script:not([type])').length") == 0
    labels = browser.value("[...document.querySelectorAll('.ytick text')].map((one) => one.textContent.trim())")
    # Shortened to what fits, and text to the last letter.
    assert labels[0].endswith("org/owned'>blocks</a>")


@pytest.mark.parametrize("kind", ["full_report", "traced_report", "audit_report", "hostile_report"])
@pytest.mark.parametrize("width", [360, 800])
def test_nothing_sticks_out_of_a_narrow_window(kind, width, browser, request, tmp_path):
    browser.emulate(width=width)
    browser.open(written(request.getfixturevalue(kind), tmp_path))
    assert overflow(browser) == []
    assert browser.value("document.documentElement.scrollWidth") == width


def test_the_check_for_sticking_out_can_fail(browser, tmp_path):
    file = tmp_path / "wide.html"
    file.write_text("<html data-ready='1'><body><p style='width: 5000px'>x</p></body></html>")
    browser.open(file)
    assert overflow(browser) == ["P."]


def test_the_page_is_dark_where_the_user_wants_it_so_and_the_plots_are_too(browser, traced_report, tmp_path):
    file = written(traced_report, tmp_path)
    seen = {}
    for scheme in ("light", "dark"):
        browser.emulate(scheme=scheme)
        browser.open(file)
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        label = browser.value("getComputedStyle(document.querySelector('.ytick text')).fill")
        seen[scheme] = (ground, label)
    assert seen == {"light": (LIGHT, "rgb(28, 30, 33)"), "dark": (DARK, "rgb(230, 232, 235)")}


def test_a_change_of_the_colour_scheme_is_followed(browser, traced_report, tmp_path):
    browser.open(written(traced_report, tmp_path))
    browser.emulate(scheme="dark")
    label = "getComputedStyle(document.querySelector('.ytick text')).fill"
    assert browser.value(f"new Promise((done) => setTimeout(() => done({label}), 500))") == "rgb(230, 232, 235)"


def test_print_is_light_even_where_the_screen_is_dark(browser, full_report, tmp_path):
    browser.emulate(scheme="dark", media="print")
    browser.open(written(full_report, tmp_path))
    assert browser.value("getComputedStyle(document.body).color") == "rgb(28, 30, 33)"


def test_the_heat_maps_are_drawn_with_their_marks(browser, traced_report, tmp_path):
    browser.open(written(traced_report, tmp_path))
    plots = browser.value(
        """[...document.querySelectorAll(".plot")].map((box) => ({
        images: box.querySelectorAll(".hm image").length,
        symbols: [...box.querySelectorAll(".trace.scatter")].map((one) => one.querySelectorAll(".point").length),
        names: [...box.querySelectorAll(".ytick text")].map((one) => one.textContent.trim()),
        steps: [...box.querySelectorAll(".xtick text")].map((one) => one.textContent.trim()),
        codes: [...box.querySelectorAll(".textpoint")].map((one) => one.textContent.trim()),
        label: box.getAttribute("aria-label"),
        }))"""
    )
    assert len(plots) == 2
    for plot in plots:
        assert plot["images"] == 3
        # Three non-finite cells, the ground of the two marks, the marks.
        assert plot["symbols"] == [3, 2, 2]
        assert plot["names"] == ["embed", "blocks.0", "blocks.1", "head", "(the model)"]
        assert plot["steps"] == ["0", "1", "2", "4", "5"]
        assert plot["codes"] == ["NH501", "NH104"]
    assert plots[0]["label"].startswith("heat map of activations: largest finite value about 1.0e+05, in blocks.1")


def test_an_explain_page_opens(browser, full_report, tmp_path):
    browser.open(written(full_report, tmp_path))
    height = "document.querySelector('details.page').getBoundingClientRect().height"
    closed = browser.value(height)
    browser.value("document.querySelector('details.page summary').click()")
    assert browser.value(height) > closed + 100


def test_a_hundred_thousand_records_open(browser, traced_report, tmp_path):
    names = tuple(f"model.layers.{number}.attention.projection" for number in range(2000))
    values = tuple((*(math.exp(row / 300 + step / 9) for step in range(49)), math.nan) for row in range(2000))
    large = Magnitudes(names, tuple(range(50)), values, values)
    # benchmarks/html_report.py measures how long that takes; here a loaded machine has its time.
    assert browser.open(written(replace(traced_report, magnitudes=large), tmp_path)) < 15_000
    assert "2,000 modules are drawn in 154 rows" in browser.value("document.body.innerText")
    assert browser.value("document.querySelectorAll('.plot .trace.scatter .point').length") < 200
