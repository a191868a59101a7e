"""Memory, and compute, against inner steps; without torch, so that the report can draw it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.papers.memory.points import Growth

MIB = 2.0**20
MARKERS = "os^D"


def draw(
    path: Path, yang: Mapping[str, Growth], rajeswaran: Mapping[str, Growth],
    titles: tuple[str, str], floors: tuple[float, float],
) -> None:  # fmt: skip
    """Write the PNG.

    Args:
        path: where to.
        yang, rajeswaran: what was measured, by method.
        titles: what each was measured on.
        floors: bytes of a supervised step there.
    """
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    axes = figure.subplots(1, 3)
    panel(axes[0], yang, "peak", floors[0])
    axes[0].set_title(f"Yang et al., Fig. 2\n{titles[0]}")
    panel(axes[1], rajeswaran, "peak", floors[1])
    panel(axes[2], rajeswaran, "seconds")
    for cell in axes[1:]:
        cell.set_title(f"Rajeswaran et al., Fig. 2b\n{titles[1]}")
    figure.savefig(path, dpi=120)


def panel(axes: Axes, found: Mapping[str, Growth], what: str, floor: float | None = None) -> None:
    """One panel; solid: cached features, or iMAML; dashed: as published. One colour a method.

    Open markers, smaller from method to method, so that equal curves are all seen.

    Args:
        axes: empty.
        found: by method.
        what: a field of `Point`.
        floor: bytes of a supervised step.
    """
    looks: dict[str, dict[str, Any]] = {}
    for name, each in found.items():
        method, _, variant = name.partition("/")
        number = len(looks)
        if method not in looks:
            size = 11.0 - 2.5 * number
            looks[method] = {
                "color": f"C{number}", "marker": MARKERS[number], "markersize": size,
                "markerfacecolor": "none",
            }  # fmt: skip
        style = "--" if variant == "as_published" else "-"
        axes.loglog(
            list(each.points),
            [getattr(point, what) / (MIB if what == "peak" else 1.0)
             for point in each.points.values()],
            style, **looks[method],
            label=f"{method}, {variant.replace('_', ' ')}",
        )  # fmt: skip
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
