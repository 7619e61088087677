"""The HTML report of a long run: time to write it, its size, and how long headless Chromium takes to open it.

Opening is from the start of the navigation, in a browser that has just been started, until all plots are drawn; "again"
is a second file in the same browser. CPU time is that of the page's main thread, less at the mercy of what else runs.

    python benchmarks/html_report.py [--modules 2000] [--steps 50] [--rounds 5]
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reports"))

from chromium import PROGRAM, Chromium

from nanhunt.findings import DataTable, Finding, Location, Magnitudes, Report, Verdict
from nanhunt.reports import html


def long_run(num_modules: int, num_steps: int) -> Report:
    """A run that grows in the middle of the model until its last step is NaN from there on; all made up."""
    rng = random.Random(0)
    names = tuple(f"model.layers.{n // 8}.{'qkvomnud'[n % 8]}_projection" for n in range(num_modules))
    middle = num_modules // 2

    def size(row: int, step: int) -> float:
        if step == num_steps - 1 and row >= middle:
            return math.nan
        return math.exp(rng.gauss(row / num_modules, 0.5) + (step / 4 if abs(row - middle) < num_modules / 10 else 0))

    values = tuple(tuple(size(row, step) for step in range(num_steps)) for row in range(num_modules))
    place = Location("forward", "aten::log", module=names[middle], step=num_steps - 1)
    finding = Finding("NH501", "log-of-nonpositive", "error", "observed", "log-of-nonpositive", "log of 0", place)
    table = DataTable("layers", ("layer", "gain"), tuple((name, 1.0) for name in names))
    return Report(
        *("made up", (), (finding,), (), Verdict("observed", ("made up",))),
        magnitudes=Magnitudes(names, tuple(range(num_steps)), values, values),
        tables=(table,),
    )


def main() -> None:
    """Renders and opens the page as often as asked, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = long_run(options.modules, options.steps)
    started = time.perf_counter()
    page = html.render(report)
    first = time.perf_counter() - started
    started = time.perf_counter()
    html.render(report)
    cells = options.modules * options.steps
    print(f"{cells:,} cells: written in {first:.2f} s, the second time in {time.perf_counter() - started:.2f} s")
    print(f"size {len(page.encode()) / 1e6:.2f} MB")
    if PROGRAM is None:
        sys.exit("chromium is not installed: opening was not measured")
    opened: list[int] = []
    again: list[int] = []
    cpu: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one.html", "two.html"):
            (Path(folder) / name).write_text(page, encoding="utf-8")
        for _ in range(options.rounds):
            with Chromium(timeout_s=60) as browser:
                browser.emulate()
                opened.append(browser.open(Path(folder) / "one.html"))
                cpu.append(round(1000 * browser.cpu_s()))
                again.append(browser.open(Path(folder) / "two.html"))
    for name, taken in (("opened", opened), ("of it CPU time", cpu), ("again", again)):
        print(f"{name}: {statistics.median(taken):.0f} ms, median of {len(taken)} ({min(taken)} to {max(taken)})")


if __name__ == "__main__":
    main()
