"""Error over inner steps, one panel a problem; without torch, so that the report can draw it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[int, float]]
"""By method, then by inner steps K."""


def draw(path: Path, problems: Mapping[str, Curves]) -> None:
    """Write the PNG."""
    drawing(problems).savefig(path, dpi=120)


def drawing(problems: Mapping[str, Curves]) -> Figure:
    """The picture; solid: implicit, dashed: unrolled."""
    columns = len(problems)
    figure = Figure(figsize=(5 * columns, 5.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for cell, (title, curves) in zip(axes[0], problems.items(), strict=True):
        _panel(cell, title, curves)
    return figure


def _panel(axes: Axes, title: str, curves: Curves) -> None:
    """Open markers, smaller from method to method, so that equal curves are all seen."""
    for number, (name, by_steps) in enumerate(curves.items()):
        axes.loglog(
            list(by_steps), list(by_steps.values()), "-" if "_cg" in name else "--",
            label=name.replace("_cg", ", CG steps: ").replace("_", " "),
            marker="o", markersize=max(10.0 - 1.8 * number, 3.0), markerfacecolor="none",
        )  # fmt: skip
    title = title.replace("_", " ")
    axes.set(xlabel="inner steps K", ylabel="relative error of the hypergradient", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
