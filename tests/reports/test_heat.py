"""The data of the heat maps, without a browser."""

import math
from dataclasses import replace

import pytest

from nanhunt.findings import Finding, Location, Magnitudes
from nanhunt.reports.heat import MAX_COLUMNS, MAX_ROWS, heat_maps


def finding(module: str = "", step: int | None = 0, *, op: str = "aten::log", tensor: str = "") -> Finding:
    place = Location("forward", op, module=module, tensor=tensor, step=step)
    return Finding("NH101", "a", "error", "observed", "a", "m", place)


def maps(rows, findings=(), *, modules=None, steps=None):
    rows = tuple(tuple(row) for row in rows)
    names = modules or tuple(f"layer.{number}" for number in range(len(rows)))
    return heat_maps(Magnitudes(names, steps or tuple(range(len(rows[0]))), rows, rows), findings)


def test_cells_are_powers_of_ten_and_what_has_none_is_told_apart():
    plot = maps([[1.0, 100.0, 1e-3], [0.0, None, math.inf], [math.nan, 1e308, 5e-324]])["plots"][0]
    assert plot["logs"] == [[0.0, 2.0, -3.0], [None, None, None], [None, 308.0, -323.306]]
    assert plot["zeros"] == [(1, 0)]
    assert plot["nonfinite"] == [(1, 2, "inf"), (2, 0, "NaN")]


def test_a_step_that_was_not_sampled_gets_a_column_for_its_mark(traced_report):
    heat = heat_maps(traced_report.magnitudes, traced_report.findings)
    assert heat["columns"] == ["0", "1", "2", "4", "5"]
    assert [row[3] for row in heat["plots"][0]["logs"]] == [None] * 5
    assert heat["notes"] == ["magnitudes were not sampled at step 4: the column is there for its mark"]


def test_a_finding_is_marked_at_its_module_or_the_nearest_around_it(traced_report):
    heat = heat_maps(traced_report.magnitudes, traced_report.findings)
    assert heat["marks"] == [
        {"row": 4, "column": 3, "code": "NH501"},
        {"row": 2, "column": 2, "code": "NH104"},
    ]


@pytest.mark.parametrize(
    ("found", "row"),
    [
        (finding("layer.1"), 1),
        (finding("layer.1.inner.norm"), 1),
        (finding(tensor="layer.0.weight"), 0),
        (finding("other"), None),
        (finding(op=""), None),
    ],
)
def test_where_no_module_fits_the_step_alone_is_marked(found, row):
    heat = maps([[1.0], [1.0]], [found])
    assert heat["marks"] == [{"row": row, "column": 0, "code": "NH101"}]


def test_a_finding_without_a_step_is_not_marked():
    assert maps([[1.0]], [finding(step=None)])["marks"] == []


def test_many_modules_and_steps_are_drawn_as_the_largest_of_their_neighbours_and_that_is_said():
    num_rows, num_columns = 10 * MAX_ROWS, 2 * MAX_COLUMNS
    rows = [[1.0] * num_columns for _ in range(num_rows)]
    rows[25][7] = 1e4
    rows[1599][399] = math.nan
    rows[1598][399] = math.inf
    heat = maps(rows, [finding("layer.25", 7)])
    plot = heat["plots"][0]
    assert (len(heat["rows"]), len(heat["columns"])) == (MAX_ROWS, MAX_COLUMNS)
    assert plot["logs"][2][3] == 4.0
    assert sum(value for line in plot["logs"] for value in line if value) == 4.0
    assert plot["nonfinite"] == [(159, 199, "NaN")]
    assert heat["marks"] == [{"row": 2, "column": 3, "code": "NH101"}]
    assert heat["rows"][2] == "layer.20 to layer.29 (10 modules)"
    assert heat["labels"][2] == "layer.20 +9"
    assert heat["columns"][3] == "6 to 7"
    assert heat["notes"] == [
        "1,600 modules are drawn in 160 rows: each shows the largest of its values, and the JSON report has them all",
        "400 steps are drawn in 200 columns: each shows the largest of its values, and the JSON report has them all",
    ]


def test_one_row_that_stands_out_does_not_make_the_others_alike():
    rows = [[1.0 + step for step in range(100)] for _ in range(3)] + [[1e30] + [1.0] * 99]
    plot = maps(rows)["plots"][0]
    assert plot["range"] == (0.0, 1.991)
    assert plot["summary"] == (
        "largest finite value about 1.0e+30, in layer.3 at step 0; the colours span 1.0e+00 to 9.8e+01, 7 cells beyond"
    )


def test_values_that_are_all_alike_span_a_power_of_ten():
    assert maps([[10.0, 10.0]])["plots"][0]["range"] == (0.5, 1.5)


def test_the_summary_says_what_the_picture_shows(traced_report):
    first, second = heat_maps(traced_report.magnitudes, traced_report.findings)["plots"]
    assert first["summary"] == (
        "largest finite value about 1.0e+05, in blocks.1 at step 2; 3 non-finite cells, first inf in blocks.1 at step"
        " 5; 2 cells exactly 0"
    )
    assert "3 non-finite cells, first NaN in embed at step 5; 1 cell exactly 0" in second["summary"]


def test_the_largest_float_is_named():
    assert "about 1.8e+308, in layer.0" in maps([[1.7976931348623157e308]])["plots"][0]["summary"]


def test_nothing_sampled_is_said(traced_report):
    empty = replace(traced_report.magnitudes, gradients=((None,) * 4,) * 5)
    assert heat_maps(empty, ())["plots"][1]["summary"] == "nothing was sampled"
