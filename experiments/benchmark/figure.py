"""Time and memory of every method against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.benchmark.rows import Row  # noqa: E402

MARKERS = "os^vD<>pPX*"


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Both over those of the supervised step, log-log, one line a method.

    Args:
        path: the PNG to write.
        title: what was run.
        rows: of the case ``peers``.
    """
    figure, both = plt.subplots(1, 2, figsize=(12, 7), layout="constrained")
    measured = [row for row in rows if row.cost is not None and row.steps is not None]
    for axes, what in zip(both, ("time", "memory"), strict=True):
        for number, name in enumerate(dict.fromkeys(row.method for row in measured)):
            of = [row for row in measured if row.method == name]
            style = "-" if name.startswith("implicit") else "--"
            ratios = [getattr(row.cost, f"{what}_ratio") for row in of]
            look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
            axes.loglog([row.steps for row in of], ratios, style, label=name, alpha=0.8, **look)
        axes.axhline(1.0, color="0.7", label="supervised")
        axes.set(xlabel="inner steps K (and N = K)", ylabel=f"{what} over the supervised step's")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
