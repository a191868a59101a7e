"""Draw time_and_memory.png from the table of time and memory against K in docs/cost.md.

    python docs/figures/time_and_memory.py
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TABLES = HERE.parent / "cost.md"
TABLE = re.compile(r"^(\| \| time, K = .*)\n.*\n((?:\|.*\n)+)", re.MULTILINE)
# Name in the table, name in the figure, colour.
METHODS = (
    ("MAML (learn2learn), whole network", "MAML", "#b8860b"),
    ("ANIL (learn2learn), as published", "ANIL, ITD-BiO as published", "#b03a2e"),
    ("released step", "released code of Algorithm 1", "#7d8a97"),
    ("ANIL (learn2learn), features cached", "ANIL, features cached", "#1a7f5a"),
    ("implicit, newton", "ImplicitCGHead", "#3f51b5"),
)


class Cost(NamedTuple):
    """Of one method at one K, in units of the supervised step."""

    time: float
    memory: float


def read(text: str) -> dict[str, dict[int, Cost]]:
    """Each method's costs by K, from the Markdown of docs/cost.md."""
    (heading, rows), costs = TABLE.findall(text)[0], {}
    steps = [int(number) for number in re.findall(r"\d+", heading)]  # of the times, the memories
    half = len(steps) // 2
    for row in rows.splitlines():
        name, *values = (cell.strip() for cell in row.split("|")[1:-1])
        pairs = zip(values[:half], values[half:], strict=True)
        costs[name] = {k: Cost(float(time), float(memory))
                       for k, (time, memory) in zip(steps[:half], pairs, strict=True)}  # fmt: skip
    return costs


def digest(costs: dict[str, dict[int, Cost]]) -> str:
    """Of the numbers; the picture carries it, so that a test can say when it is out of date."""
    return hashlib.sha256(repr(costs).encode()).hexdigest()


def draw(costs: dict[str, dict[int, Cost]]) -> Figure:
    """Time and memory against K, side by side."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), Cost._fields, strict=True):
        for row, name, colour in METHODS:
            steps = sorted(costs[row])
            values = [getattr(costs[row][k], quantity) for k in steps]
            width = 3.0 if name == "ImplicitCGHead" else 1.6
            axes.plot(steps, values, "o-", label=name, color=colour, lw=width, ms=4)
        _decorate(axes, quantity)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _decorate(axes: Axes, quantity: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="inner steps K")
    axes.set_title(f"{quantity}, in supervised steps", loc="left", fontsize=10)
    axes.set_xticks([1, 5, 20, 100], ["1", "5", "20", "100"])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    costs = read(TABLES.read_text(encoding="utf-8"))
    about = {"Software": None, "Description": digest(costs)}
    draw(costs).savefig(HERE / "time_and_memory.png", dpi=150, metadata=about)
