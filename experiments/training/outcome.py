"""What a run leaves: its folder, its artifacts with the learning curve, its result, and what a
person is told."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

import matplotlib
import pandas as pd
import torch

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.training import checkpoint  # noqa: E402
from experiments.training.loop import Training  # noqa: E402
from experiments.training.meta_learner import COUNTS, Interval, MetaLearner  # noqa: E402
from experiments.training.peak_memory import process_peak  # noqa: E402


def folder_of(run: Any, output: str) -> Path:
    """The run's own folder in ``output``, locked until the run has completed."""
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    folder = checkpoint.new_folder(Path(output), name)
    run.afterwards.append(partial(checkpoint.remove, folder))
    return folder


def save(run: Any, training: Training, centroid: Interval | None) -> None:
    """The artifacts, in the run's folder and in the database."""
    folder, learner, best = training.folder, training.learner, training.scores.best
    optimizer = {"optimizer": learner.optimizer.state_dict()}
    files = [_save_parameters(folder / checkpoint.PARAMETERS, learner, optimizer)]
    if best is not None and best.iteration:
        at = {"iteration": best.iteration}
        with best.in_place():
            files.append(_save_parameters(folder / checkpoint.EARLY, learner, at))
    if training.steps:
        files.append(folder / "learning_curve.png")
        draw(files[-1], run.config, training, centroid)
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


def summary(training: Training, centroid: Interval | None) -> dict[str, Any]:
    """What the run found, as it is recorded."""
    test, scores, name = training.scores.result, training.scores, training.learner.measure.name
    result: dict[str, Any] = {
        f"test_{name}": test.mean,
        "test_half_width": test.half_width,
        "iterations": training.steps,
        "training_seconds": training.seconds,
        **{f"step_{part}": median_high(training.history.values(f"train/{part}") or [None])
           for part in ("seconds", "cpu_seconds")},
        "step_peak_bytes": float(training.peak),
        "process_peak_bytes": float(process_peak()),
        "diverged": training.diverged,
        "skipped_tasks": training.skipped_tasks(),
    }  # fmt: skip
    if centroid is not None:
        result |= {"centroid_accuracy": centroid.mean, "centroid_half_width": centroid.half_width}
    if scores.best is not None and scores.stopped is not None:
        result |= {
            f"early_stopped_{name}": scores.stopped.mean,
            "early_stopped_half_width": scores.stopped.half_width,
            "early_stopped_at": scores.best.iteration,
        }
    return result


def announce(
    run: Any, training: Training, result: Mapping[str, Any], centroid: Interval | None
) -> None:
    """What a person wants to know at the end."""
    measure, scores = training.learner.measure, training.scores
    show, assured = measure.show, f"{training.schedule.test_tasks} new tasks (95 % interval)"
    said = {f"test {measure.name}": f"{show(scores.result)} over {assured}"}
    if scores.best is not None and scores.stopped is not None:
        at = f"outer iteration {scores.best.iteration}, the best validation"
        said["early stopped"] = f"{show(scores.stopped)} with theta of {at}"
    if centroid is not None:
        said["raw pixels"] = f"{show(centroid)} with nearest centroid on the same tasks"
    if training.steps:
        said["outer step"] = (
            f"{result['step_seconds']:.3f} s (median of {training.steps}), "
            f"{training.peak / 2**20:.1f} MiB of tensors at its peak "
            f"({result['process_peak_bytes'] / 2**20:.0f} MiB the process)"
        )
    if result["skipped_tasks"]:
        said["skipped"] = f"{result['skipped_tasks']} tasks that could not be learnt"
    said |= {"not solved": unsolved(training), "diverged": training.diverged or ""}
    said["recorded"] = "not recorded (-u)"
    if run.observers:
        serve = "the embedded database; python -m experiments.tracking.serve"
        where = serve if run.journal.label == "embedded" else run.journal.label
        said["recorded"] = f"run {run._id} of {where}"
    said["learning curve"] = str(training.folder / "learning_curve.png") if training.steps else ""
    print()
    for name, words in said.items():
        if words:
            print(f"{name:16} {words}")


def unsolved(training: Training) -> str:
    """How often a hypergradient may be more than 1 % wrong, and what of it was not solved."""
    errors, inner, linear = (sum(training.history.values(f"train/{name}")) for name in COUNTS)
    if not errors + inner + linear:
        return ""
    tasks = training.steps * training.schedule.meta_batch
    return (
        f"inner problems {inner:.0f}, linear systems {linear:.0f} of {tasks} tasks, "
        f"{errors:.0f} hypergradients to 1 %: raise algorithm.steps or algorithm.l2; "
        "algorithm.cg_steps or algorithm.damping"
    )


def draw(path: Path, config: Any, training: Training, centroid: Interval | None) -> None:
    """A PNG: scores above, what was solved and how well below, over outer iterations."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    table = training.history.table()
    _draw_scores(top, table, training, centroid)
    for name, label, color, most in (
        # A bound above 1 says no more than 1; it may be 1e300.
        ("train/hypergradient_error", "hypergradient's error, relative", None, 1.0),
        ("train/cg_residual", "linear residual, relative", None, math.inf),
        ("train/hypergradient_norm", "hypergradient norm", "0.6", math.inf),
    ):
        if name in table:
            bottom.semilogy(table[name].clip(upper=most), label=label, color=color)
    bottom.set(xlabel="outer iteration", ylabel="norm")
    bottom.set_ylim(top=100 * bottom.get_ylim()[1])  # room for the legend
    bottom.legend(loc="upper left", ncols=3, fontsize="small")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    task, method = config["tasks"], config["algorithm"]
    ways = "" if task["name"] == "sine" else f"{task['ways']}-way "
    parts = [task["name"], f"{ways}{task['shots']}-shot", method["name"]]
    parts += [f"step={method['step']}"] if method["step"] else []
    parts += [f"K={method['steps']}"] if method["steps"] else []
    figure.suptitle(", ".join([*parts, f"seed {config['seed']}"]))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_scores(
    axes: plt.Axes, table: pd.DataFrame, training: Training, centroid: Interval | None
) -> None:
    measure = training.learner.measure
    names = [f"train/query_{measure.name}", f"validation/{measure.name}", "validation/half_width"]
    scores = measure.factor * table.reindex(columns=names)
    means = scores.pop(names[0]).rolling(20, min_periods=1).mean()
    axes.plot(means, color="0.7", label="training tasks, mean of 20")
    seen = scores.dropna()
    axes.errorbar(seen.index, seen[names[1]], seen[names[2]], fmt="o-", capsize=3,
                  label="validation tasks, 95 % interval")  # fmt: skip
    for value, color, style, name in (
        (training.scores.result, "C2", "--", "test tasks"),
        (centroid, "C3", ":", "raw pixels, centroid"),
    ):
        if value is not None and math.isfinite(value.mean):
            label = f"{name}: {measure.show(value)}"
            axes.axhline(measure.factor * value.mean, color=color, linestyle=style, label=label)
    axes.set_ylabel(f"query {measure.name}" + (f" ({measure.unit})" if measure.unit else ""))
    axes.legend(loc="best")
