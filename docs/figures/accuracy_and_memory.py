"""Draw accuracy_and_memory.png: validation accuracy while training, memory against K.

    python docs/figures/accuracy_and_memory.py

The accuracies are those of docs/records/accuracy_caltech101.jsonl.gz (final runs, three seeds), the
memory is that of docs/cost.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TABLES = HERE.parent / "cost.md"
RUNS = HERE.parent / "records" / "accuracy_caltech101.jsonl.gz"
BUDGET = 240  # seconds of training: the final runs
# Algorithm, inner solver and l2 in the record; name in the figure, colour, width.
CURVES = (
    ("anil", None, None, "ANIL", "#1a7f5a", 1.2),
    ("itd_bio", None, None, "ITD-BiO", "#b03a2e", 1.2),
    ("rm_metal", "gradient", 0.1, "Algorithm 1, fixed steps", "#7d8a97", 1.2),
    ("rm_metal", "newton", 0.1, "ImplicitCGHead", "#3f51b5", 2.2),
)
# Row of the table, name in the figure, colour, width.
METHODS = (
    ("MAML (learn2learn), whole network", "MAML", "#b8860b", 1.6),
    ("ANIL (learn2learn), as published", "ANIL, ITD-BiO published", "#b03a2e", 1.6),
    ("ANIL (learn2learn), features cached", "ANIL, features cached", "#1a7f5a", 4.5),
    ("implicit, newton", "ImplicitCGHead", "#3f51b5", 2.2),
)


class Curve(NamedTuple):
    """Validation accuracy of one run, from 0 to 1, and whether it left the finite numbers."""

    iterations: list[int]
    accuracies: list[float]
    diverged: bool


def read_memory() -> dict[str, dict[int, float]]:
    """Each method's memory by K, over the supervised step's, from docs/cost.md."""
    program = runpy.run_path(str(HERE / "time_and_memory.py"))
    costs = program["read"](TABLES.read_text(encoding="utf-8"))
    return {row: {k: cost.memory for k, cost in costs[row].items()} for row, *_ in METHODS}


def read_runs(path: Path = RUNS) -> dict[str, dict[int, Curve]]:
    """Each method's curves by seed, from the recorded runs."""
    names = {key[:3]: key[3] for key in CURVES}
    curves: dict[str, dict[int, Curve]] = {name: {} for name in names.values()}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for run in map(json.loads, lines):
            config = run["runs"]["config"]
            name = names.get(_key(config["algorithm"]))
            if name and config["budget"] == BUDGET:
                found = run["metrics"]["validation/accuracy"]
                diverged = run["runs"]["result"]["diverged"] is not None
                curves[name][config["seed"]] = Curve(found["steps"], found["values"], diverged)
    return curves


def _key(algorithm: dict[str, Any]) -> tuple[str, str | None, float | None]:
    return algorithm["name"], algorithm["step"], algorithm["l2"]


def digest(memory: dict[str, dict[int, float]], curves: dict[str, dict[int, Curve]]) -> str:
    """Of the numbers; the picture carries it, so that a test can say when it is out of date."""
    return hashlib.sha256(repr((memory, curves)).encode()).hexdigest()


def draw(memory: dict[str, dict[int, float]], curves: dict[str, dict[int, Curve]]) -> Figure:
    """Accuracy and memory side by side."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, curves)
    _draw_memory(right, memory)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), frameon=False, fontsize=9)
    return figure


def _draw_accuracy(axes: Axes, curves: dict[str, dict[int, Curve]]) -> None:
    for _, _, _, name, colour, width in CURVES:
        for label, (iterations, accuracies, diverged) in zip(
            [name, None, None], curves[name].values(), strict=True
        ):
            percent = [100 * value for value in accuracies]
            axes.plot(iterations, percent, label=label, color=colour, lw=width)
            if diverged:
                axes.plot(iterations[-1:], percent[-1:], "x", color=colour, ms=9, mew=2)
    axes.set(xlabel="outer iterations", ylim=(15, 80), xticks=[0, 500, 1000, 1500])
    axes.set_title("validation accuracy, %, three seeds", loc="left", fontsize=10)


def _draw_memory(axes: Axes, memory: dict[str, dict[int, float]]) -> None:
    for row, name, colour, width in METHODS:
        steps = sorted(memory[row])
        values = [memory[row][k] for k in steps]
        axes.plot(steps, values, "o-", label=name, color=colour, lw=width, ms=width + 2.5)
    axes.set(xscale="log", yscale="log", xlabel="inner steps K")
    axes.set_title("memory, in supervised steps", loc="left", fontsize=10)
    axes.set_xticks([1, 5, 20, 100], ["1", "5", "20", "100"])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()


if __name__ == "__main__":
    memory, curves = read_memory(), read_runs()
    about = {"Software": None, "Description": digest(memory, curves)}
    draw(memory, curves).savefig(HERE / "accuracy_and_memory.png", dpi=150, metadata=about)
