"""The report's arithmetic, without a database."""

import csv
import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawing

from experiments.report import content, write
from experiments.report.content import Table, significant
from experiments.report.figures import band, draw_curves
from experiments.report.summary import run_list
from experiments.statistics import seeds_mean

# Abramowitz and Stegun (1964), Table 26.10, and its limit, the normal quantile.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042,
         120: 1.980, 2000: 1.961}  # fmt: skip


@pytest.mark.parametrize("freedom", list(TABLE))
def test_intervals_are_student_s(freedom: int) -> None:
    """Values -1 and 1 in turn: their standard error by hand, t from the tables."""
    number = freedom + 1
    values = [(-1.0) ** n for n in range(number)]
    mean = sum(values) / number
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom / number)
    found = seeds_mean([*values, math.nan, math.inf])  # what is not finite is left out
    assert found.half_width / error == pytest.approx(TABLE[freedom], abs=5.1e-4)
    assert found[::2] == (pytest.approx(mean), number)
    assert [*seeds_mean([0.5])] == pytest.approx([0.5, math.nan, 1], nan_ok=True)
    assert [*seeds_mean([])] == pytest.approx([math.nan, math.nan, 0], nan_ok=True)


def test_a_band_is_over_where_all_curves_are() -> None:
    found = band([pd.Series([0.0, 2, 4], [0, 2, 4]), pd.Series([1.0, 5], [1, 3])])
    assert found.index.tolist() == [1, 2, 3]
    assert found.to_dict("list") == {"mean": [1, 2.5, 4], "min": [1, 2, 3], "max": [1, 3, 5]}
    assert band([pd.Series([0.0, 1], [0, 1]), pd.Series([0.0, 1], [2, 3])]).empty
    assert band([pd.Series(dtype=float)]).empty and band([]).empty


def drawn(*runs: tuple[list[int], list[float]], diverged: str = "") -> Drawing:
    """One method's curves: iterations, a second later each, and scores."""
    made = [SimpleNamespace(points=pd.DataFrame({"iteration": steps, "seconds": np.add(steps, 1.0),
                                                 "score": scores}), diverged=diverged)
            for steps, scores in runs]
    return draw_curves({"anil": made}, math.nan)  # type: ignore[dict-item] # fmt: skip


def test_a_cross_is_where_a_run_diverged() -> None:
    drawing = drawn(([5, 9, 12], [0.5, 0.4, math.nan]), diverged="at 12")
    for axes, at in zip(drawing.axes, (9, 10), strict=True):
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([at], [40])


def test_seeds_with_nothing_in_common_are_drawn_one_by_one() -> None:
    drawing = drawn(([12], [0.4]), ([13], [0.4]))
    for axes, at in zip(drawing.axes, ([12, 13], [13, 14]), strict=True):
        assert [list(line.get_xdata()) for line in axes.lines] == [[x] for x in at]
    (legend,) = [axes.get_legend() for axes in drawing.axes if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["anil"]


def test_a_cell_is_no_formula_markup_or_command() -> None:
    """In a spreadsheet, a page made of the Markdown, and LaTeX, where a row may begin [2pt]."""
    record = {"first": "[2pt]", "second": "=1+1", "third": "\\|<b>", "fourth": -1.5}
    table = Table("t", "caption", content.texts("first", "second", "third"), [record])
    text = write.csv_text([record], content.Source("@command", ["=1+1", "-2"]))
    (row,) = csv.DictReader(io.StringIO(text))
    assert [row[name] for name in record] == ["[2pt]", "'=1+1", "\\|<b>", "-1.5"]
    assert row["source_command"] == "'@command" and row["source_runs"][0] == "'"
    cells = write.markdown_grid(table).splitlines()[-1]
    assert r"| \\\|&lt;b> |" in re.sub(" +", " ", cells)
    assert "\n{[}2pt]" in write.latex_text(table)
    starred = replace(table, records=[{**record, "first": "**$x$** &lt; _a_b__ --c"}])
    shown = re.sub(" +", " ", write.markdown_grid(starred))
    assert r"| \*\*\$x\$\*\* &amp;lt; \_a_b\_\_ --c |" in shown
    shown = write.latex_text(starred)  # \\\\* is a command, two hyphens are a dash
    assert "\n{*}{*}" in shown and r"\_\_ -{}-c" in shown
    bad = "<img src=x>![x](http://there)`|"
    table = replace(table, caption=bad, notes=[bad], source=content.Source(f"x '{bad}'", [bad]))
    outside = re.sub("`x '[^`]*`", "", write.markdown_text(table))  # code is shown as it is
    assert "<img" not in outside and "![x]" not in outside and outside.count(r"!\[x]") == 3


def test_numbers_of_any_size_and_run_ids_are_short() -> None:
    values = (0.7, 1.5, 2e-5, 4044.4, 99.6, math.nan, -0.25)
    shown = ["0.70", "1.5", "2.0e-05", "4044", "1.0e+02", "–", "-0.25"]
    assert [significant(value) for value in values] == shown
    assert run_list([3, 1, 2, 2, 7, 9, 10, "mine"]) == "1-3, 7, 9, 10, mine"
    assert run_list([]) == ""
