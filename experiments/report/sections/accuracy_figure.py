"""Test accuracy of every method of a sweep as a picture: mean, interval, and each seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Drawing

from experiments.report.content import Figure, Source, file_name
from experiments.report.methods import looks
from experiments.report.request import Request
from experiments.report.summary import Summary
from experiments.report.sweep_state import SweepState
from experiments.statistics import seeds_mean

Runs = Mapping[str, Sequence[Summary]]


def accuracy_figure(state: SweepState, request: Request) -> Figure | None:
    """None while no final run is complete."""
    found = {method.name: request.summaries(method.runs) for method in state.methods}
    runs = {name: of for name, of in found.items() if any(math.isfinite(run.test) for run in of)}
    if not runs:
        return None
    absent = [name for name in found if name not in runs]
    records = tuple(
        {"method": name, "run": run.run.id, "seed": run.run.settings.get("seed"),
         "test_accuracy": run.test, "half_width": run.test_half_width}
        for name, of in runs.items() for run in of
    )  # fmt: skip
    return Figure(
        file_name("test", state.name, state.benchmark),
        f"{state.benchmark}. Test accuracy at the end of the budget. Large mark and bar: mean over"
        " seeds with its 95 % interval (Student's t; none for one seed); small marks: the seeds.",
        lambda: _draw(runs),
        records,
        Source(state.command(), tuple(run.run.id for of in runs.values() for run in of)),
        (f"Missing: {', '.join(absent)}.",) if absent else (),
    )


def _draw(runs: Runs) -> Drawing:
    """The best method on top; the axis covers the means and seeds, not every wide interval."""
    means = {name: seeds_mean([100 * run.test for run in of]) for name, of in runs.items()}
    order = sorted(means, key=lambda name: means[name].mean)
    styles = looks(runs)
    drawing = Drawing(figsize=(8.5, 1.1 + 0.36 * len(order)), layout="constrained")
    axes = drawing.subplots()
    for height, name in enumerate(order):
        look, mean = styles[name], means[name]
        half = mean.half_width if math.isfinite(mean.half_width) else 0.0
        axes.errorbar(mean.mean, height, xerr=half, color=look.color, marker=look.marker,
                      markersize=8, capsize=4, linewidth=1.8)
        seeds = [100 * run.test for run in runs[name]]
        axes.plot(seeds, [height - 0.28] * len(seeds), ".", color=look.color, alpha=0.7)
        axes.annotate(f"{mean.mean:.1f}", (mean.mean, height), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize="small")
    values = [100 * run.test for of in runs.values() for run in of if math.isfinite(run.test)]
    margin = max(2.0, 0.12 * (max(values) - min(values)))
    axes.set_xlim(max(0.0, min(values) - margin), min(100.0, max(values) + margin))
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.3)
    axes.set_xlabel("test accuracy (%)")
    axes.grid(alpha=0.25, axis="x")
    return drawing
