"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.meta_learning import Interval, OuterStep  # noqa: E402

Validations = Sequence[tuple[int, Interval]]


def draw(
    path: Path,
    title: str,
    steps: Sequence[OuterStep],
    validations: Validations,
    centroid: Interval,
    test: Interval,
) -> None:
    """Accuracies above, what was solved and how well below, over outer iterations.

    Args:
        path: the PNG to write.
        title: what was run.
        steps: one for each outer iteration.
        validations: (iteration, accuracy) pairs.
        centroid: nearest centroid on raw pixels, on test tasks.
        test: the final test accuracy.
    """
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    _accuracies(top, steps, validations, centroid, test)
    _residuals(bottom, steps)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _accuracies(
    axes: plt.Axes,
    steps: Sequence[OuterStep],
    validations: Validations,
    centroid: Interval,
    test: Interval,
) -> None:
    means = _running_mean([100 * step.query_accuracy for step in steps], 20)
    axes.plot(range(1, len(means) + 1), means, color="0.7", label="training tasks, mean of 20")
    at = [iteration for iteration, _ in validations]
    mean = [100 * value.mean for _, value in validations]
    half = [100 * value.half_width for _, value in validations]
    axes.errorbar(at, mean, half, fmt="o-", capsize=3, label="validation tasks, 95 % interval")
    axes.axhline(100 * test.mean, color="C2", linestyle="--", label=f"test tasks: {test}")
    axes.axhline(
        100 * centroid.mean, color="C3", linestyle=":", label=f"raw pixels, centroid: {centroid}"
    )
    axes.set_ylabel("query accuracy (%)")
    axes.legend(loc="best")
    axes.grid(alpha=0.3)


def _residuals(axes: plt.Axes, steps: Sequence[OuterStep]) -> None:
    iterations = range(1, len(steps) + 1)
    axes.semilogy(iterations, [s.inner_residual for s in steps], label="inner gradient, relative")
    axes.semilogy(iterations, [s.cg_residual for s in steps], label="CG residual, relative")
    axes.semilogy(
        iterations, [s.hypergradient_norm for s in steps], color="0.6", label="hypergradient norm"
    )
    axes.set_xlabel("outer iteration")
    axes.set_ylabel("norm")
    axes.set_ylim(top=100 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left", ncols=3, fontsize="small")
    axes.grid(alpha=0.3)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
