"""What a run leaves: its folder, its artifacts with the learning curve, its result, and what a
person is told."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.training import checkpoint  # noqa: E402
from experiments.training.loop import Training  # noqa: E402
from experiments.training.meta_learner import Interval, MetaLearner  # noqa: E402
from experiments.training.peak_memory import process_peak  # noqa: E402
from experiments.training.scores import History  # noqa: E402


def new_folder(run: Any, output: str) -> Path:
    """The run's own folder in ``output``; an error of one line if it cannot be made."""
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    return checkpoint.new_folder(Path(output), name)


def save(run: Any, training: Training, centroid: Interval | None) -> None:
    """The artifacts, in the run's folder and in the database."""
    folder, learner = training.folder, training.learner
    optimizer = {"optimizer": learner.optimizer.state_dict()}
    files = [_save_parameters(folder / "parameters.pt", learner, optimizer)]
    if training.scores.best is not None and training.scores.best.iteration:
        at = {"iteration": training.scores.best.iteration}
        with training.scores.best.in_place():
            files.append(_save_parameters(folder / "early_stopped_parameters.pt", learner, at))
    files.append(folder / "learning_curve.png")
    draw(files[-1], _title(run.config), training, centroid)
    for file in files:
        run.add_artifact(file)


def _save_parameters(path: Path, learner: MetaLearner, more: Mapping[str, Any]) -> Path:
    state = {
        "backbone": learner.algorithms.backbone.state_dict(),
        "head": learner.algorithms.head.state_dict(),
        "theta": [parameter.detach() for parameter in learner.parameters],
        **more,
    }
    checkpoint.replace(path, lambda file: torch.save(state, file))
    return path


def _title(config: Mapping[str, Any]) -> str:
    task, method = config["tasks"], config["algorithm"]
    ways = "" if task["name"] == "sine" else f"{task['ways']}-way "
    solver = f"step={method['step']}, " if method["step"] else ""
    return (
        f"{task['name']}, {ways}{task['shots']}-shot, {method['name']}, {solver}"
        f"K={method['steps']}, seed {config['seed']}"
    )


def summary(training: Training, centroid: Interval | None) -> dict[str, Any]:
    """What the run found, as it is recorded."""
    test, name = training.scores.result, training.learner.measure.name
    assert test is not None
    result: dict[str, Any] = {
        f"test_{name}": test.mean,
        "test_half_width": test.half_width,
        "iterations": training.steps,
        "training_seconds": training.seconds,
        "step_seconds": _median(training.history.values("train/seconds")),
        "step_cpu_seconds": _median(training.history.values("train/cpu_seconds")),
        "step_peak_bytes": float(training.peak),
        "process_peak_bytes": float(process_peak()),
        "diverged": training.diverged,
        "skipped_tasks": training.skipped_tasks(),
    }
    if centroid is not None:
        result |= {"centroid_accuracy": centroid.mean, "centroid_half_width": centroid.half_width}
    if training.scores.best is not None and training.scores.stopped is not None:
        result |= {
            f"early_stopped_{name}": training.scores.stopped.mean,
            "early_stopped_half_width": training.scores.stopped.half_width,
            "early_stopped_at": training.scores.best.iteration,
        }
    return result


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if len(values) else None


def announce(
    run: Any, training: Training, result: Mapping[str, Any], centroid: Interval | None
) -> None:
    """What a person wants to know at the end."""
    measure, number = training.learner.measure, training.schedule.test_tasks
    assert training.scores.result is not None
    score = measure.show(training.scores.result)
    print(f"\n{'test ' + measure.name:17}{score} over {number} new tasks (95 % interval)")
    if training.scores.best is not None and training.scores.stopped is not None:
        at = f"outer iteration {training.scores.best.iteration}, the best validation"
        print(f"early stopped    {measure.show(training.scores.stopped)} with theta of {at}")
    if centroid is not None:
        raw = measure.show(centroid)
        print(f"raw pixels       {raw} with nearest centroid on the same tasks")
    if training.steps:
        print(
            f"outer step       {result['step_seconds']:.3f} s (median of {training.steps}), "
            f"{training.peak / 2**20:.1f} MiB of tensors at its peak "
            f"({result['process_peak_bytes'] / 2**20:.0f} MiB the process)"
        )
    if result["skipped_tasks"]:
        print(f"skipped          {result['skipped_tasks']} tasks that could not be learnt")
    if unsolved(training):
        print(f"not solved       {unsolved(training)}")
    if training.diverged is not None:
        print(f"diverged         {training.diverged}")
    print(f"recorded         {_where(run)}")
    print(f"learning curve   {training.folder / 'learning_curve.png'}")


def unsolved(training: Training) -> str:
    """How often a hypergradient may be more than 1 % wrong, and what of it was not solved."""
    errors, inner, linear = (
        sum(training.history.values(f"train/{name}"))
        for name in ("unsolved", "unsolved_inner", "unsolved_linear")
    )
    if not errors + inner + linear:
        return ""
    tasks = training.steps * training.schedule.meta_batch
    return (
        f"inner problems {inner:.0f}, linear systems {linear:.0f} of {tasks} tasks, "
        f"{errors:.0f} hypergradients to 1 %: raise algorithm.steps or algorithm.l2; "
        "algorithm.cg_steps or algorithm.damping"
    )


def _where(run: Any) -> str:
    """Where the run is recorded."""
    if not run.observers:
        return "not recorded (-u)"
    label = run.journal.label
    if label == "embedded":
        return f"run {run._id} of the embedded database; python -m experiments.tracking.serve"
    return f"run {run._id} of {label}"


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
    _draw_scores(top, training, centroid)
    _draw_residuals(bottom, training.history)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_scores(axes: plt.Axes, training: Training, centroid: Interval | None) -> None:
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


def _draw_residuals(axes: plt.Axes, history: History) -> None:
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
