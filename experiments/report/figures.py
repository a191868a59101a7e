"""Pictures: learning curves, and curves on logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from experiments.report.content import Figure, Items, shortened
from experiments.report.summary import Summary

Runs = Mapping[str, Sequence[Summary]]
"""By method, the seeds' runs."""

AXES = {"iteration": "outer iteration", "seconds": "seconds of training"}
CAPTION = (
    "{benchmark}. Validation accuracy against outer iterations (left) and seconds of training"
    " (right;{clock} loading of data and validation excluded). Line: mean over {seeds}; band: from"
    " the lowest to the highest seed, straight between validations, as far as all seeds go; seeds"
    " that have no stretch in common are drawn one by one. A cross: the run diverged there."
)
DOTTED = " Dotted: the budget, where the test accuracy of the table is taken."


class Look(NamedTuple):
    """A method's line: one colour everywhere, told apart without colour too."""

    color: str  # from the colour-blind safe sets of Okabe and Ito, and of Tol
    dashes: str
    marker: str
    family: str = ""  # what is adapted: the title of panels of its own


HEAD, NETWORK = "head adapted", "whole network adapted"
LOOKS = {
    "ImplicitCGHead": Look("#0072B2", "-", "o", HEAD),
    "as_printed": Look("#56B4E9", "--", "s", HEAD),
    "as_printed_adam": Look("#44AA99", "-.", "X", HEAD),
    "as_released": Look("#332288", ":", "^", HEAD),
    "itd_bio": Look("#D55E00", "-", "v", HEAD),
    "anil": Look("#E69F00", "-", "D", HEAD),
    "fo_anil": Look("#882255", "--", "P", HEAD),
    "r2d2": Look("#AA4499", "--", "<", HEAD),
    "logistic": Look("#661100", "-.", ">", HEAD),
    "protonet": Look("#DDCC77", ":", "*", HEAD),
    "ImplicitMAML": Look("#009E73", "-", "o", NETWORK),
    "ImplicitMAML_HF": Look("#117733", "--", "s", NETWORK),
    "maml": Look("#CC79A7", "-", "v", NETWORK),
    "maml_printed": Look("#CC6677", ":", "^", NETWORK),
    "fomaml": Look("#000000", "--", "D", NETWORK),
    "reptile": Look("#999933", "-.", "P", NETWORK),
}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for every name; names that are no known method get one in turn."""
    colors = cycle(look.color for look in LOOKS.values())
    spare = map(Look, colors, cycle(("-", "--", ":", "-.")), cycle("osv^DPX<>*"))
    return {name: LOOKS.get(name) or next(spare) for name in names}


def label(name: str) -> str:
    """A name as matplotlib draws it as it is: no mathematics, not left out of a legend."""
    text = shortened(name, 48).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def band(curves: Sequence[pd.Series]) -> pd.DataFrame:
    """The ``mean``, ``min`` and ``max`` by x of curves (y by ascending x, straight between points)
    where all of them are, those without a point left out; empty where that is nowhere."""
    kept = [curve for curve in curves if len(curve)] or [pd.Series(dtype=float)]
    joined = pd.concat(kept, axis=1).sort_index()
    joined = joined.interpolate("index", limit_area="inside").dropna()
    return pd.DataFrame({how: getattr(joined, how)(axis=1) for how in ("mean", "min", "max")})


def draw_curves(methods: Runs, budget: float) -> Drawing:
    """A row of two panels for each family of methods that is there; the budget, in seconds, is a
    dotted line, if it is not nan."""
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
                _line(axes, label(name), styles[name], runs, horizontal)
            axes.grid(alpha=0.25)
            axes.set_xlabel(AXES[horizontal])
        row[0].set_ylabel("validation accuracy (%)")
        row[0].set_title(family, loc="left", fontsize="medium", fontweight="bold")
        if budget > 0:
            row[1].axvline(budget, color="0.55", linestyle=":", zorder=1)
        # beside the panels: inside it would hide a curve
        row[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
                      borderaxespad=0.3)  # fmt: skip
    return drawing


def curves(benchmark: str, found: Runs) -> Items:
    """Yang et al. 2025, Fig. 1, with every validation that it is made of, where there are any; a
    note names the methods that are not drawn."""
    methods = {name: runs for name, runs in found.items() if any(len(run.points) for run in runs)}
    if not methods:
        return
    runs = [(method, run) for method, of in methods.items() for run in of]
    budgets = {run.run.number("config.budget") for _, run in runs}
    budget = budgets.pop() if len(budgets) == 1 else math.nan
    counts = [len(of) for of in methods.values()]
    least = f"{min(counts)} to " if min(counts) < max(counts) else ""
    seeds = "the only seed" if max(counts) == 1 else f"{least}{max(counts)} seeds"
    cpu = all(run.run.settings.get("budget_clock") == "cpu" for _, run in runs)
    clock = " of the process's own time," if cpu else ""
    caption = CAPTION.format(benchmark=benchmark, seeds=seeds, clock=clock) + DOTTED * (budget > 0)
    records = [
        {"method": method, "run": run.run.id, "seed": run.run.seed,
         "outer_iteration": point.iteration, "training_seconds": point.seconds,
         f"validation_{run.score}": point.score, "half_width": point.half_width}
        for method, run in runs for point in run.points.itertuples()
    ]  # fmt: skip
    absent = ", ".join(name for name in found if name not in methods)
    notes = [f"Missing: {absent}."] if absent else []
    draw = partial(draw_curves, methods, budget)
    yield Figure("curves", caption, draw, records, notes=notes)


def _line(axes: Axes, name: str, look: Look, runs: Sequence[Summary], horizontal: str) -> None:
    curves = [_curve(run, horizontal) for run in runs]
    joined = band(curves)
    style: dict[str, Any] = {"color": look.color, "linestyle": look.dashes, "marker": look.marker}
    style |= {"markersize": 4.5, "linewidth": 1.7}
    if joined.empty:
        for number, curve in enumerate(curves):
            axes.plot(curve.index, curve, label="" if number else name, **style)
    else:
        every = max(1, len(joined) // 6)
        axes.plot(joined.index, joined["mean"], label=name, markevery=every, **style)
        axes.fill_between(joined.index, joined["min"], joined["max"], color=look.color, alpha=0.15,
                          linewidth=0)  # fmt: skip
    for run, curve in zip(runs, curves, strict=True):
        if run.diverged and len(curve):
            axes.plot(curve.index[-1], curve.iloc[-1], "x", color=look.color, markersize=9,
                      markeredgewidth=2)  # fmt: skip


def _curve(run: Summary, horizontal: str) -> pd.Series:
    """Finite accuracies in per cent, by iteration or seconds."""
    points = run.points[[horizontal, "score"]].astype(float)
    points = points[np.isfinite(points).all(axis=1)].drop_duplicates(horizontal)
    return 100 * points.set_index(horizontal)["score"]


def draw_panels(
    panels: Mapping[str, Mapping[str, pd.Series]], dashed: Callable[[str], bool], **axes_labels: str
) -> Drawing:
    """A panel a title, a line a curve, on logarithmic scales.

    One colour for what stands before a name's ``/``. Open markers, smaller from colour to colour,
    so that equal curves are all seen.
    """
    drawing = Drawing(figsize=(5.5 * len(panels), 5.0), layout="constrained")
    grid = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        methods = list(dict.fromkeys(name.partition("/")[0] for name in curves))
        for name, curve in curves.items():
            n = methods.index(name.partition("/")[0])
            axes.loglog(
                curve, "--" if dashed(name) else "-", color=f"C{n}", marker="os^D"[n % 4],
                markersize=max(11.0 - 2.0 * n, 3.0), markerfacecolor="none",
                label=label(name.replace("/", ", ")),
            )  # fmt: skip
        axes.set(title=label(title), **axes_labels)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return drawing
