"""Validation scores against outer iterations and against seconds (Yang et al. 2025, Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from experiments.report.content import Record
from experiments.report.curves import Curve, band
from experiments.report.methods import Look, looks
from experiments.report.summary import Summary

Curves = Mapping[str, Sequence[Summary]]
"""By method, the seeds' runs."""

AXES = ("outer iteration", "seconds of training")
CAPTION = (
    "Validation {score} against outer iterations (left) and seconds of training (right;{clock}"
    " loading of data and validation excluded). Line: mean over {seeds}; band: from the lowest to"
    " the highest seed, straight between validations, as far as all seeds go; seeds that have no"
    " stretch in common are drawn one by one. A cross: the run diverged there."
)


def draw_curves(methods: Curves, score: str, budget: float | None) -> Drawing:
    """A row of two panels for each family of methods that is there.

    Args:
        methods: complete runs by the label of their line.
        score: "accuracy", shown in per cent, or another.
        budget: seconds, a dotted line at the right; None: no line.
    """
    styles = looks(methods)
    families = list(dict.fromkeys(look.family for look in styles.values()))
    drawing = Drawing(figsize=(11.5, 0.6 + 3.9 * len(families)), layout="constrained")
    grid = drawing.subplots(len(families), 2, squeeze=False, sharey="all")
    for row in grid[1:]:
        row[1].sharex(grid[0, 1])
    for row, family in zip(grid, families, strict=True):
        own = {name: runs for name, runs in methods.items() if styles[name].family == family}
        for axes, horizontal in zip(row, AXES, strict=True):
            for name, runs in own.items():
                _line(axes, name, styles[name], runs, horizontal == AXES[1], score)
            axes.grid(alpha=0.25)
            axes.set_xlabel(horizontal)
        row[0].set_ylabel(f"validation {score}" + (" (%)" if score == "accuracy" else ""))
        row[0].set_title(family, loc="left", fontsize="medium", fontweight="bold")
        if budget:
            row[1].axvline(budget, color="0.55", linestyle=":", zorder=1)
        _legend(row[1])
    return drawing


def _legend(axes: Axes) -> None:
    """Beside the panels: inside it would hide a curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0.3)


def curve_records(methods: Curves) -> tuple[Record, ...]:
    """Every validation of every run that the figure is made of."""
    return tuple(
        {"method": name, "run": run.run.id, "seed": run.run.settings.get("seed"),
         "outer_iteration": point.iteration, "training_seconds": point.seconds,
         f"validation_{run.score}": point.score, "half_width": point.half_width}
        for name, runs in methods.items() for run in runs for point in run.points
    )  # fmt: skip


def curve_caption(methods: Curves, score: str) -> str:
    """What lines and bands are, with the number of seeds."""
    counts = sorted({len(runs) for runs in methods.values()})
    numbers = " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1])))
    seeds = "the only seed" if counts[-1] == 1 else f"{numbers} seeds"
    clocks = {run.run.settings.get("budget_clock") for runs in methods.values() for run in runs}
    clock = " of the process's own time," if clocks == {"cpu"} else ""
    return CAPTION.format(score=score, seeds=seeds, clock=clock)


def _line(
    axes: Axes, name: str, look: Look, runs: Sequence[Summary], by_seconds: bool, score: str
) -> None:
    factor = 100.0 if score == "accuracy" else 1.0
    curves = [_curve(run, by_seconds, factor) for run in runs]
    joined = band(curves)
    style: dict[str, Any] = {"color": look.color, "linestyle": look.dashes, "marker": look.marker}
    style |= {"markersize": 4.5, "linewidth": 1.7}
    if joined is None:
        for number, (x, y) in enumerate(curves):
            axes.plot(x, y, label="" if number else name, **style)
    else:
        every = max(1, len(joined.at) // 6)
        axes.plot(joined.at, joined.mean, label=name, markevery=every, **style)
        axes.fill_between(joined.at, joined.low, joined.high, color=look.color, alpha=0.15,
                          linewidth=0)  # fmt: skip
    for run, (x, y) in zip(runs, curves, strict=True):
        if run.diverged and x:
            axes.plot(x[-1], y[-1], "x", color=look.color, markersize=9, markeredgewidth=2)


def _curve(run: Summary, by_seconds: bool, factor: float) -> Curve:
    points = [point for point in run.points if math.isfinite(point.score)]
    if by_seconds:
        points = [point for point in points if math.isfinite(point.seconds)]
    x = [point.seconds if by_seconds else float(point.iteration) for point in points]
    return x, [factor * point.score for point in points]
