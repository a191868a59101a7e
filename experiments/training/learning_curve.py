"""The learning curve as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.training.history import History  # noqa: E402
from experiments.training.loop import Training  # noqa: E402
from experiments.training.meta_learner import Interval  # noqa: E402


def draw(path: Path, title: str, training: Training, centroid: Interval | None) -> None:
    """Scores above, what was solved and how well below, over outer iterations.

    Args:
        path: the PNG to write.
        title: what was run.
        training: the finished run.
        centroid: nearest centroid on raw pixels, on test tasks; None for regression.
    """
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    _scores(top, training, centroid)
    _residuals(bottom, training.history)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scores(axes: plt.Axes, training: Training, centroid: Interval | None) -> None:
    measure = training.learner.measure
    scores = training.history.values(f"train/query_{measure.name}")
    means = _running_mean([measure.factor * score for score in scores], 20)
    axes.plot(range(1, len(means) + 1), means, color="0.7", label="training tasks, mean of 20")
    at = [iteration for iteration, _ in training.scores.validations]
    mean = [measure.factor * value.mean for _, value in training.scores.validations]
    half = [measure.factor * value.half_width for _, value in training.scores.validations]
    axes.errorbar(at, mean, half, fmt="o-", capsize=3, label="validation tasks, 95 % interval")
    for value, color, style, name in (
        (training.scores.result, "C2", "--", "test tasks"),
        (centroid, "C3", ":", "raw pixels, centroid"),
    ):
        if value is not None and math.isfinite(value.mean):
            label = f"{name}: {measure.show(value)}"
            axes.axhline(measure.factor * value.mean, color=color, linestyle=style, label=label)
    axes.set_ylabel(f"query {measure.name}" + (f" ({measure.unit})" if measure.unit else ""))
    axes.legend(loc="best")
    axes.grid(alpha=0.3)


def _residuals(axes: plt.Axes, history: History) -> None:
    lines = (
        # A bound above 1 says no more than 1; it may be 1e300.
        ("train/hypergradient_error", "hypergradient's error, relative", None, 1.0),
        ("train/cg_residual", "linear residual, relative", None, math.inf),
        ("train/hypergradient_norm", "hypergradient norm", "0.6", math.inf),
    )
    for name, label, color, most in lines:
        values = [min(value or math.nan, most) for value in history.values(name)]
        if values:
            axes.semilogy(range(1, len(values) + 1), values, label=label, color=color)
    axes.set_xlabel("outer iteration")
    axes.set_ylabel("norm")
    axes.set_ylim(top=100 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left", ncols=3, fontsize="small")
    axes.grid(alpha=0.3)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
