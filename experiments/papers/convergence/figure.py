"""The four parts as one picture; without torch, so that the report can draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.statistics import Mean

LABELS = {"inner_steps": "inner steps K", "cg_steps": "conjugate gradient steps N"}
BOUNDS = {"inner_steps": "K_0", "cg_steps": "N_0"}
LEAST = 1e-32  # below rounding: a norm that is zero has a logarithm too

Curve = Mapping[int, float]


class Floors(NamedTuple):
    """Theorem 1 at one K: the floor by batch size, and the slope."""

    by_batch: Mapping[int, Mean]
    slope: Mean


class Findings(NamedTuple):
    """What the picture shows; all values are squared hypergradient norms.

    Attributes:
        averages, lasts: by problem, then by T.
        slope: of the averages.
        floors: by K.
        undercut: by ``inner_steps`` or ``cg_steps``, start, and number of steps.
        bounds: K_0 and N_0, by the same names.
    """

    averages: Sequence[Curve]
    lasts: Sequence[Curve]
    slope: Mean
    floors: Mapping[int, Floors]
    undercut: Mapping[str, Mapping[str, Curve]]
    bounds: Mapping[str, int]


def draw(path: Path, found: Findings) -> None:
    """Write the PNG."""
    drawing(found).savefig(path, dpi=120)


def drawing(found: Findings) -> Figure:
    """The picture."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _theorem_2(axes[0, 0], found)
    _theorem_1(axes[0, 1], found.floors)
    for cell, what in zip(axes[1], LABELS, strict=True):
        _bound(cell, what, found.undercut[what], found.bounds[what])
    for cell in axes.flat:
        cell.grid(alpha=0.3)
    return figure


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
    axes.set_title(f"Theorem 2: slope {show(found.slope)}")
    axes.legend()


def _theorem_1(axes: Axes, floors: Mapping[int, Floors]) -> None:
    for number, (inner_steps, each) in enumerate(floors.items()):
        sizes = list(each.by_batch)
        means = [each.by_batch[b].mean for b in sizes]
        widths = [each.by_batch[b].half_width for b in sizes]
        # an interval that reaches below zero has no lower end on this scale
        below = [min(w, 0.9 * m) for w, m in zip(widths, means, strict=True)]
        label = f"K = {inner_steps}: slope {show(each.slope)}"
        axes.errorbar(sizes, means, [below, widths], fmt="o-", capsize=3, label=label)
        if number == len(floors) - 1:
            axes.plot(sizes, [means[0] * sizes[0] / b for b in sizes], "k--", linewidth=0.8,
                      label="slope -1")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tasks in a batch |B|", ylabel=r"floor of $\|\nabla F\|^2$")
    axes.set_title("Theorem 1: the floor")
    axes.legend()


def _bound(axes: Axes, what: str, found: Mapping[str, Curve], bound: int) -> None:
    for start, by_steps in found.items():
        values = [max(value, LEAST) for value in by_steps.values()]
        axes.loglog(list(by_steps), values, "o-", label=f"{start} start")
    axes.axvline(bound, color="0.5", linestyle="--", label=f"${BOUNDS[what]}$ = {bound}")
    axes.set(xlabel=LABELS[what], ylabel=r"last $\|\nabla F\|^2$")
    axes.set_title("Appendix B.2")
    axes.legend()


def show(value: Mean) -> str:
    """``-1.005 ± 0.038``."""
    return f"{value.mean:.3f} ± {value.half_width:.3f}"
