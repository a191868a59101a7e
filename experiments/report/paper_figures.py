"""The pictures of the papers' experiments, for `experiments.papers` and for the report of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.report.columns import MIB
from experiments.report.figures import label
from experiments.statistics import Mean

Curve = Mapping[int, float]
"""Values by a number of steps, or by another count."""


# Memory


class Point(NamedTuple):
    """The peak of live tensors in bytes, and seconds (median), of one task's outer step."""

    peak: float
    seconds: float


class Growth(NamedTuple):
    """What was measured by inner steps K, and the K that were left out for want of memory."""

    points: dict[int, Point]
    left_out: list[int]


def memory_panel(
    axes: Axes, found: Mapping[str, Growth], what: str, floor: float | None = None
) -> None:
    """One panel, of a field of `Point` by method; ``floor``: bytes of a supervised step.

    Solid: cached features, or iMAML; dashed: as published. One colour a method. Open markers,
    smaller from method to method, so that equal curves are all seen.
    """
    looks: dict[str, dict[str, Any]] = {}
    for name, each in found.items():
        method, _, variant = name.partition("/")
        number = len(looks)
        if method not in looks:
            looks[method] = {"color": f"C{number}", "marker": "os^D"[number % 4],
                             "markersize": max(11.0 - 2.5 * number, 3.0),
                             "markerfacecolor": "none"}  # fmt: skip
        values = [getattr(point, what) / (MIB if what == "peak" else 1.0)
                  for point in each.points.values()]  # fmt: skip
        style = "--" if variant == "as_published" else "-"
        name = label(f"{method}, {variant.replace('_', ' ')}")
        axes.loglog(list(each.points), values, style, label=name, **looks[method])
    if floor is not None:
        axes.axhline(floor / MIB, color="0.6", linewidth=1, label="supervised step")
    unit = "peak of live tensors, MiB" if what == "peak" else "seconds an outer step"
    axes.set(xlabel="inner steps K", ylabel=f"{unit}, one task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")


def draw_memory(found: Mapping[str, Growth], floor: float | None) -> Drawing:
    """Memory and time of one paper's methods."""
    drawing = Drawing(figsize=(11.5, 5.0), layout="constrained")
    left, right = drawing.subplots(1, 2)
    memory_panel(left, found, "peak", floor)
    memory_panel(right, found, "seconds")
    return drawing


# Error of the hypergradient

Errors = Mapping[str, Mapping[str, Curve]]
"""By problem, method and inner steps K."""


def draw_errors(problems: Errors) -> Drawing:
    """Error over inner steps, one panel a problem; solid: implicit, dashed: unrolled.

    Open markers, smaller from method to method, so that equal curves are all seen.
    """
    drawing = Drawing(figsize=(5 * len(problems), 5.2), layout="constrained")
    panels = drawing.subplots(1, len(problems), squeeze=False)[0]
    for axes, (title, curves) in zip(panels, problems.items(), strict=True):
        for number, (name, by_steps) in enumerate(curves.items()):
            axes.loglog(
                list(by_steps), list(by_steps.values()), "-" if "_cg" in name else "--",
                label=label(name.replace("_cg", ", CG steps: ").replace("_", " ")),
                marker="o", markersize=max(10.0 - 1.8 * number, 3.0), markerfacecolor="none",
            )  # fmt: skip
        axes.set(xlabel="inner steps K", ylabel="relative error of the hypergradient",
                 title=label(title.replace("_", " ")))  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower left")
    return drawing


# Convergence

STEPS = {"inner_steps": "inner steps K", "cg_steps": "conjugate gradient steps N"}
BOUNDS = {"inner_steps": "K_0", "cg_steps": "N_0"}
LEAST = 1e-32  # below rounding: a norm that is zero has a logarithm too


class Floors(NamedTuple):
    """Theorem 1 at one K: the floor by batch size, and the slope."""

    by_batch: Mapping[int, Mean]
    slope: Mean


class Findings(NamedTuple):
    """What the picture shows; all values are squared hypergradient norms."""

    averages: Sequence[Curve]  # by problem, then by T
    lasts: Sequence[Curve]
    slope: Mean  # of the averages
    floors: Mapping[int, Floors]  # by K
    undercut: Mapping[str, Mapping[str, Curve]]  # by "inner_steps" or "cg_steps", start, steps
    bounds: Mapping[str, int]  # K_0 and N_0, by the same names


def draw_convergence(found: Findings) -> Drawing:
    """The four parts of the experiment."""
    drawing = Drawing(figsize=(11, 8.5), layout="constrained")
    axes = drawing.subplots(2, 2)
    _theorem_2(axes[0, 0], found)
    _theorem_1(axes[0, 1], found.floors)
    for cell, what in zip(axes[1], STEPS, strict=True):
        _bound(cell, what, found.undercut[what], found.bounds[what])
    for cell in axes.flat:
        cell.grid(alpha=0.3)
        cell.legend()
    return drawing


def _theorem_2(axes: Axes, found: Findings) -> None:
    for number, (curve, norms) in enumerate(zip(found.averages, found.lasts, strict=True)):
        axes.loglog(list(curve), list(curve.values()), color=f"C{number}",
                    label=f"problem {number}, average")  # fmt: skip
        kept = {t: n for t, n in norms.items() if n > 1e-20}
        axes.loglog(list(kept), list(kept.values()), color=f"C{number}", linestyle=":", alpha=0.7)
    first = found.averages[0]
    end = max(first)
    axes.loglog(list(first), [first[end] * end / t for t in first], "k--", linewidth=0.8,
                label="slope -1")  # fmt: skip
    axes.set_ylim(bottom=1e-12)
    axes.set(xlabel="outer iterations T", ylabel=r"$\|\nabla F\|^2$: average (dotted: last)")
    axes.set_title(f"Theorem 2: slope {show_mean(found.slope)}")


def _theorem_1(axes: Axes, floors: Mapping[int, Floors]) -> None:
    for number, (inner_steps, each) in enumerate(floors.items()):
        sizes = list(each.by_batch)
        means = [each.by_batch[b].mean for b in sizes]
        widths = [each.by_batch[b].half_width for b in sizes]
        # an interval that reaches below zero has no lower end on this scale
        below = [min(w, 0.9 * m) for w, m in zip(widths, means, strict=True)]
        name = f"K = {inner_steps}: slope {show_mean(each.slope)}"
        axes.errorbar(sizes, means, [below, widths], fmt="o-", capsize=3, label=name)
        if number == len(floors) - 1:
            axes.plot(sizes, [means[0] * sizes[0] / b for b in sizes], "k--", linewidth=0.8,
                      label="slope -1")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tasks in a batch |B|", ylabel=r"floor of $\|\nabla F\|^2$")
    axes.set_title("Theorem 1: the floor")


def _bound(axes: Axes, what: str, found: Mapping[str, Curve], bound: int) -> None:
    for start, by_steps in found.items():
        values = [max(value, LEAST) for value in by_steps.values()]
        axes.loglog(list(by_steps), values, "o-", label=f"{start} start")
    axes.axvline(bound, color="0.5", linestyle="--", label=f"${BOUNDS[what]}$ = {bound}")
    axes.set(xlabel=STEPS[what], ylabel=r"last $\|\nabla F\|^2$")
    axes.set_title("Appendix B.2")


def show_mean(value: Mean) -> str:
    """``-1.005 ± 0.038``."""
    return f"{value.mean:.3f} ± {value.half_width:.3f}"
