"""The picture that the command draws: both papers' memory, and Rajeswaran's compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from experiments.report.paper_figures import Growth, memory_panel


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
    memory_panel(axes[0], yang, "peak", floors[0])
    axes[0].set_title(f"Yang et al., Fig. 2\n{titles[0]}")
    memory_panel(axes[1], rajeswaran, "peak", floors[1])
    memory_panel(axes[2], rajeswaran, "seconds")
    for cell in axes[1:]:
        cell.set_title(f"Rajeswaran et al., Fig. 2b\n{titles[1]}")
    figure.savefig(path, dpi=120)
