"""The pictures of trainings: learning curves, and every method's test accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from experiments.report.content import Record, shortened
from experiments.report.summary import Summary
from experiments.statistics import seeds_mean

Runs = Mapping[str, Sequence[Summary]]
"""By method, the seeds' runs."""

Floats = np.ndarray
Curve = tuple[Sequence[float], Sequence[float]]

AXES = ("outer iteration", "seconds of training")
CAPTION = (
    "Validation {score} against outer iterations (left) and seconds of training (right;{clock}"
    " loading of data and validation excluded). Line: mean over {seeds}; band: from the lowest to"
    " the highest seed, straight between validations, as far as all seeds go; seeds that have no"
    " stretch in common are drawn one by one. A cross: the run diverged there."
)


class Look(NamedTuple):
    """A method's line: one colour everywhere, told apart without colour too.

    Attributes:
        color: from the colour-blind safe sets of Okabe and Ito, and of Tol.
        dashes: a matplotlib line style.
        family: what is adapted; each family has panels of its own, with this title.
    """

    color: str
    dashes: str
    marker: str
    family: str


HEAD, NETWORK, OTHER = "head adapted", "whole network adapted", ""

LOOKS = {
    "rm_metal": Look("#0072B2", "-", "o", HEAD),
    "rm_metal_paper": Look("#56B4E9", "--", "s", HEAD),
    "rm_metal_as_released": Look("#332288", ":", "^", HEAD),
    "itd_bio": Look("#D55E00", "-", "v", HEAD),
    "anil": Look("#E69F00", "-", "D", HEAD),
    "fo_anil": Look("#882255", "--", "P", HEAD),
    "imaml_gd": Look("#009E73", "-", "o", NETWORK),
    "imaml_hf": Look("#117733", "--", "s", NETWORK),
    "maml": Look("#CC79A7", "-", "v", NETWORK),
    "fomaml": Look("#000000", "--", "D", NETWORK),
    "reptile": Look("#999933", "-.", "P", NETWORK),
}
SPARE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#332288", "#999933",
         "#882255", "#000000")  # fmt: skip
STYLES, MARKERS = ("-", "--", ":", "-."), "osv^DPX<>*"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for every name; names that are no known method get one in turn."""
    names = list(names)
    made = {
        name: Look(
            SPARE[n % len(SPARE)], STYLES[n % len(STYLES)], MARKERS[n % len(MARKERS)], OTHER
        )
        for n, name in enumerate(name for name in names if name not in LOOKS)
    }
    return {name: LOOKS.get(name) or made[name] for name in names}


def label(name: str) -> str:
    """A name as matplotlib draws it as it is: no mathematics, not left out of a legend."""
    text = shortened(name, 48).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


class Band(NamedTuple):
    """Several curves as one, over ``at``: their mean, the lowest and the highest."""

    at: Floats
    mean: Floats
    low: Floats
    high: Floats


def band(curves: Sequence[Curve]) -> Band | None:
    """Over where all of the curves are; between their points they are straight lines.

    Args:
        curves: (x, y) pairs, x ascending; points that are not finite are left out.

    Returns:
        None where there is no x that all of them cover.
    """
    kept = [_finite(curve) for curve in curves]
    kept = [curve for curve in kept if len(curve[0])]
    if not kept:
        return None
    first, last = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    at = np.unique(np.concatenate([x for x, _ in kept]))
    at = at[(at >= first) & (at <= last)]
    if not len(at):
        return None
    values = np.stack([np.interp(at, x, y) for x, y in kept])
    return Band(at, values.mean(0), values.min(0), values.max(0))


def _finite(curve: Curve) -> tuple[Floats, Floats]:
    x, y = (np.asarray(values, dtype=float) for values in curve)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def draw_curves(methods: Runs, score: str, budget: float) -> Drawing:
    """Yang et al. 2025, Fig. 1: a row of two panels for each family of methods that is there.

    Args:
        methods: complete runs by the label of their line.
        score: "accuracy", shown in per cent, or another.
        budget: seconds, a dotted line at the right; nan: no line.
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
                _line(axes, label(name), styles[name], runs, horizontal == AXES[1], score)
            axes.grid(alpha=0.25)
            axes.set_xlabel(horizontal)
        row[0].set_ylabel(f"validation {score}" + (" (%)" if score == "accuracy" else ""))
        row[0].set_title(family, loc="left", fontsize="medium", fontweight="bold")
        if budget > 0:
            row[1].axvline(budget, color="0.55", linestyle=":", zorder=1)
        # beside the panels: inside it would hide a curve
        row[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
                      borderaxespad=0.3)  # fmt: skip
    return drawing


def curve_records(methods: Runs) -> tuple[Record, ...]:
    """Every validation of every run that the figure is made of."""
    return tuple(
        {"method": name, "run": run.run.id, "seed": run.run.seed,
         "outer_iteration": point.iteration, "training_seconds": point.seconds,
         f"validation_{run.score}": point.score, "half_width": point.half_width}
        for name, runs in methods.items() for run in runs for point in run.points
    )  # fmt: skip


def curve_caption(methods: Runs, score: str) -> str:
    """What lines and bands are, with the number of seeds."""
    counts = sorted({len(runs) for runs in methods.values()})
    numbers = " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1])))
    seeds = "the only seed" if counts[-1] == 1 else f"{numbers} seeds"
    settings = [run.run.settings for runs in methods.values() for run in runs]
    cpu = all(each.get("budget_clock") == "cpu" for each in settings)
    clock = " of the process's own time," if cpu else ""
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


def draw_accuracies(runs: Runs) -> Drawing:
    """Mean, interval and each seed; the best method on top.

    The axis covers the means and seeds, not every wide interval.
    """
    means = {name: seeds_mean([100 * run.test for run in of]) for name, of in runs.items()}
    order = sorted(means, key=lambda name: means[name].mean)
    styles = looks(runs)
    drawing = Drawing(figsize=(8.5, 1.1 + 0.36 * len(order)), layout="constrained")
    axes = drawing.subplots()
    for height, name in enumerate(order):
        look, mean = styles[name], means[name]
        half = mean.half_width if math.isfinite(mean.half_width) else 0.0
        axes.errorbar(mean.mean, height, xerr=half, color=look.color, marker=look.marker,
                      markersize=8, capsize=4, linewidth=1.8)
        seeds = [100 * run.test for run in runs[name]]
        axes.plot(seeds, [height - 0.28] * len(seeds), ".", color=look.color, alpha=0.7)
        axes.annotate(f"{mean.mean:.1f}", (mean.mean, height), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize="small")
    values = [100 * run.test for of in runs.values() for run in of if math.isfinite(run.test)]
    margin = max(2.0, 0.12 * (max(values) - min(values)))
    axes.set_xlim(max(0.0, min(values) - margin), min(100.0, max(values) + margin))
    axes.set_yticks(range(len(order)), [label(name) for name in order])
    axes.set_ylim(-0.6, len(order) - 0.3)
    axes.set_xlabel("test accuracy (%)")
    axes.grid(alpha=0.25, axis="x")
    return drawing
