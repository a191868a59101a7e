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
    """Write the PNG; solid: implicit, dashed: unrolled."""
    columns = len(problems)
    figure, axes = plt.subplots(
        1, columns, figsize=(5 * columns, 5.2), layout="constrained", squeeze=False
    )
    for cell, (title, curves) in zip(axes[0], problems.items(), strict=True):
        _panel(cell, title, curves)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: plt.Axes, title: str, curves: Curves) -> None:
    for name, by_steps in curves.items():
        style = "-" if "_cg" in name else "--"
        axes.loglog(list(by_steps), list(by_steps.values()), style, label=name.replace("_", " "),
                    marker="o", markersize=4)  # fmt: skip
    axes.set(xlabel="inner steps K", ylabel="relative error of the hypergradient", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
