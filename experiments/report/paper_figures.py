"""The pictures of the papers' experiments, from the metrics and results that these record: drawn by
`experiments.papers` at the end of a run, and by the report from the database."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.report.columns import MIB
from experiments.report.figures import label

Metrics: TypeAlias = Mapping[str, pd.Series]
"""By name, as recorded: values by a number of steps, or by another count."""

STEPS = {"inner_steps": "inner steps K", "cg_steps": "conjugate gradient steps N"}
BOUNDS = {"inner_steps": "K_0", "cg_steps": "N_0"}
LEAST = 1e-32  # below rounding: a norm that is zero has a logarithm too


def named(metrics: Metrics, pattern: str) -> dict[str, pd.Series]:
    """Those whose whole name fits the pattern, by what is in its parentheses."""
    found = {name: re.fullmatch(pattern, name) for name in metrics}
    return {match[1]: metrics[name] for name, match in found.items() if match}


def by_problem(metrics: Metrics) -> dict[str, dict[str, pd.Series]]:
    """The errors of the hypergradient by problem and method."""
    found: dict[str, dict[str, pd.Series]] = {}
    for name, curve in named(metrics, "hypergradient/([^/]+/.+)").items():
        problem, _, method = name.partition("/")
        found.setdefault(problem, {})[method] = curve
    return found


def draw_memory(metrics: Metrics, *prefixes: str) -> Drawing:
    """Memory and time of one task's outer step: a row a paper, by the prefix of its metrics.

    Solid: cached features, or iMAML; dashed: as published. One colour a method. Open markers,
    smaller from method to method, so that equal curves are all seen.
    """
    drawing = Drawing(figsize=(11.5, 5.0 * len(prefixes)), layout="constrained")
    panels = ("memory", MIB, "peak of live tensors, MiB"), ("seconds", 1, "seconds an outer step")
    rows = drawing.subplots(len(prefixes), 2, squeeze=False)
    for row, prefix in zip(rows, prefixes, strict=True):
        for axes, (what, scale, unit) in zip(row, panels, strict=True):
            _growth(axes, named(metrics, f"{prefix}{what}/(.+/.+)"), scale)
            for floor in named(metrics, f"{prefix}{what}/(supervised)").values():
                axes.axhline(floor.iloc[-1] / scale, color="0.6", linewidth=1,
                             label="supervised step")  # fmt: skip
            axes.set(xlabel="inner steps K", ylabel=f"{unit}, one task")
            axes.legend(fontsize="small")
    return drawing


def _growth(axes: Axes, curves: Metrics, scale: float) -> None:
    looks: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        method, _, variant = name.partition("/")
        n = len(looks)
        looks.setdefault(method, {"color": f"C{n}", "marker": "os^D"[n % 4],
                                  "markersize": max(11.0 - 2.5 * n, 3.0)})  # fmt: skip
        axes.loglog(curve / scale, "--" if variant == "as_published" else "-", **looks[method],
                    label=label(f"{method}, {variant.replace('_', ' ')}"),
                    markerfacecolor="none")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")


def draw_errors(metrics: Metrics) -> Drawing:
    """Error over inner steps, one panel a problem; solid: implicit, dashed: unrolled.

    Open markers, smaller from method to method, so that equal curves are all seen.
    """
    problems = by_problem(metrics)
    drawing = Drawing(figsize=(5 * len(problems), 5.2), layout="constrained")
    panels = drawing.subplots(1, len(problems), squeeze=False)[0]
    for axes, (title, curves) in zip(panels, problems.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            axes.loglog(
                curve, "-" if "_cg" in name else "--",
                label=label(name.replace("_cg", ", CG steps: ").replace("_", " ")),
                marker="o", markersize=max(10.0 - 1.8 * number, 3.0), markerfacecolor="none",
            )  # fmt: skip
        axes.set(xlabel="inner steps K", ylabel="relative error of the hypergradient",
                 title=label(title.replace("_", " ")))  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower left")
    return drawing


def draw_convergence(metrics: Metrics, result: Mapping[str, float]) -> Drawing:
    """The four parts of the experiment; all values are squared hypergradient norms."""
    drawing = Drawing(figsize=(11, 8.5), layout="constrained")
    axes = drawing.subplots(2, 2)
    _theorem_2(axes[0, 0], metrics, result)
    _theorem_1(axes[0, 1], metrics, result)
    for cell, (what, bound) in zip(axes[1], BOUNDS.items(), strict=True):
        for start, curve in named(metrics, f"convergence/{what}/(warm|cold)").items():
            cell.loglog(curve.clip(lower=LEAST), "o-", label=f"{start} start")
        at = result.get(bound, math.nan)
        cell.axvline(at, color="0.5", linestyle="--", label=f"${bound}$ = {at:.0f}")
        cell.set(xlabel=STEPS[what], ylabel=r"last $\|\nabla F\|^2$", title="Appendix B.2")
    for cell in axes.flat:
        cell.grid(alpha=0.3)
        cell.legend()
    return drawing


def _theorem_2(axes: Axes, metrics: Metrics, result: Mapping[str, float]) -> None:
    averages = named(metrics, r"convergence/all_tasks/(\d+)/average")
    lasts = named(metrics, r"convergence/all_tasks/(\d+)/last")
    for number, (problem, curve) in enumerate(averages.items()):
        axes.loglog(curve, color=f"C{number}", label=f"problem {problem}, average")
        if problem in lasts:
            axes.loglog(lasts[problem][lasts[problem] > 1e-20], ":", color=f"C{number}", alpha=0.7)
    _slope_of_minus_one(axes, next(iter(averages.values())), -1)
    axes.set_ylim(bottom=1e-12)
    axes.set(xlabel="outer iterations T", ylabel=r"$\|\nabla F\|^2$: average (dotted: last)",
             title=f"Theorem 2: slope {show_slope(result, 'average_against_T')}")  # fmt: skip


def _theorem_1(axes: Axes, metrics: Metrics, result: Mapping[str, float]) -> None:
    for k, floor in (floors := named(metrics, r"convergence/floor/(\d+)")).items():
        half = metrics.get(f"convergence/floor/{k}/half_width", floor * math.nan)
        # an interval that reaches below zero has no lower end on this scale
        widths = [np.minimum(half, 0.9 * floor), half]
        axes.errorbar(floor.index, floor, widths, fmt="o-", capsize=3,
                      label=f"K = {k}: slope {show_slope(result, f'floor_K{k}')}")  # fmt: skip
    for floor in list(floors.values())[-1:]:
        _slope_of_minus_one(axes, floor, 0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tasks in a batch |B|", ylabel=r"floor of $\|\nabla F\|^2$",
             title="Theorem 1: the floor")  # fmt: skip


def _slope_of_minus_one(axes: Axes, curve: pd.Series, through: int) -> None:
    """A dashed line through one of the curve's points."""
    x = curve.index.to_numpy()
    line = curve.iloc[through] * x[through] / x
    axes.plot(x, line, "k--", linewidth=0.8, label="slope -1")


def show_slope(result: Mapping[str, float], name: str) -> str:
    """``-1.005 ± 0.038``."""
    value, half = (result.get(f"slope_{name}{end}", math.nan) for end in ("", "_half_width"))
    return f"{value:.3f} ± {half:.3f}"
