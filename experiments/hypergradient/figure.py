"""Error over inner steps, one panel a problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

Curves = Mapping[str, Mapping[int, float]]
"""By method, then by inner steps K."""


def draw(path: Path, problems: Mapping[str, Curves]) -> None:
    """Write the PNG; solid: implicit, dotted: its last iterate, dashed: unrolled."""
    columns = len(problems)
    figure, axes = plt.subplots(
        1, columns, figsize=(5 * columns, 5.2), layout="constrained", squeeze=False
    )
    for cell, (title, curves) in zip(axes[0], problems.items(), strict=True):
        _panel(cell, title, curves)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: plt.Axes, title: str, curves: Curves) -> None:
    colors: dict[str, str] = {}
    for name, by_steps in curves.items():
        implicit, last = "_cg" in name, name.endswith("_last_iterate")
        color = colors.setdefault(name.removesuffix("_last_iterate"), f"C{len(colors)}")
        style = ":" if last else "-" if implicit else "--"
        label = name.replace("_last_iterate", ", last iterate").replace("_", " ")
        axes.loglog(list(by_steps), list(by_steps.values()), style, color=color, label=label,
                    marker=None if last else "o", markersize=4)  # fmt: skip
    axes.set(xlabel="inner steps K", ylabel="relative error of the hypergradient", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
