"""Meta-train and meta-test one algorithm on one benchmark: a Sacred experiment.

    python -m experiments.train
    python -m experiments.train with caltech101 tasks.root=DATA
    python -m experiments.train print_config with caltech101
"""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments import learning_curve, named_configs
from experiments.ingredients import algorithm, make_algorithm, make_backbone, make_tasks
from experiments.ingredients import model as model_ingredient
from experiments.ingredients import tasks as tasks_ingredient
from experiments.ingredients.tasks import TYPES as TASK_TYPES
from experiments.ingredients.tasks import Tasks
from experiments.meta_learning import Interval, MetaLearner, OuterStep
from experiments.peak_memory import peak_memory, process_peak
from experiments.tracking import TrackedExperiment, UserError, record
from l2l_implicit import checks
from l2l_implicit.tasks import nearest_centroid_accuracy

ex = TrackedExperiment(
    "train",
    ingredients=[tasks_ingredient, model_ingredient, algorithm],
    types={f"tasks.{key}": kind for key, kind in TASK_TYPES.items()},
)
named_configs.register(ex)

COUNTS = ("iterations", "meta_batch", "validate_every", "validation_tasks", "test_tasks")


@ex.config
def defaults() -> None:
    iterations = 600  # outer iterations
    meta_batch = 8  # tasks an outer iteration, |B|
    meta_lr = 0.001  # outer step size of Adam
    validate_every = 100  # outer iterations
    validation_tasks = 100
    test_tasks = 600
    threads = 1  # of torch; 0 leaves torch's own choice
    output = "runs"  # folder of the learning curve and the trained parameters
    seed = 0


class Training:
    """One run: the outer loop with what it records.

    Args:
        run: Sacred's.
        learner: theta and its steps.
        tasks: the task sets.
        seed: of every stream of tasks; validation and test tasks are the same for every run.
    """

    def __init__(self, run: Any, learner: MetaLearner, tasks: Tasks, seed: int) -> None:
        self.run, self.learner, self.tasks = run, learner, tasks
        self._stream = tasks.stream("train", seed)
        self.steps: list[OuterStep] = []
        self.validations: list[tuple[int, Interval]] = []
        self.peak = 0

    def loop(self, iterations: int, batch: int, every: int, validation_tasks: int) -> None:
        """All outer iterations, with a progress bar."""
        with tqdm(total=iterations, unit="iteration", desc="meta-training") as bar:
            for iteration in range(1, iterations + 1):
                self._iterate(iteration, batch, measure=iteration % every == 1 or every == 1)
                if iteration % every == 0 or iteration == iterations:
                    accuracy = self._validate(iteration, validation_tasks)
                    bar.set_postfix_str(f"validation {accuracy}")
                bar.update()

    def _iterate(self, iteration: int, batch: int, measure: bool) -> None:
        start = time.perf_counter()
        episodes = [self._stream.sample() for _ in range(batch)]
        loading = time.perf_counter() - start
        if measure:
            self._measure_memory(iteration, episodes)
        step = self.learner.step(episodes)
        self.steps.append(step)
        values = {f"train/{name}": value for name, value in step._asdict().items()}
        values["train/loading_seconds"] = loading
        values["train/process_peak_bytes"] = process_peak()
        record(self.run, values, iteration)

    def _measure_memory(self, iteration: int, episodes: list[Any]) -> None:
        """On a repetition of the step's gradient that is not timed: counting slows it down."""
        state = {name: b.clone() for name, b in self.learner.backbone.named_buffers()}
        peak = peak_memory(lambda: self.learner.hypergradient(episodes))
        self.peak = max(self.peak, peak)
        for name, buffer in self.learner.backbone.named_buffers():
            buffer.copy_(state[name])
        record(self.run, {"train/step_peak_bytes": peak}, iteration)

    def _validate(self, iteration: int, number: int) -> Interval:
        start = time.perf_counter()
        accuracy = self.learner.evaluate(self.tasks.stream("validation", 0), number, _quiet)
        self.validations.append((iteration, accuracy))
        seconds = time.perf_counter() - start
        values = {"accuracy": accuracy.mean, "half_width": accuracy.half_width, "seconds": seconds}
        record(self.run, {f"validation/{k}": v for k, v in values.items()}, iteration)
        return accuracy


def _check(config: Mapping[str, Any]) -> None:
    try:
        for name in COUNTS:
            checks.count(name, config[name])
        checks.positive("meta_lr", config["meta_lr"])
    except ValueError as error:
        raise UserError(str(error)) from error
    if config["threads"] < 0:
        raise UserError(
            f"threads: expected at least 0, got {config['threads']}; 0 is torch's own choice"
        )


def _centroid(tasks: Tasks, sizes: tuple[int, int, int], number: int) -> tuple[float, float]:
    """Nearest centroid on the raw pixels of the same test tasks."""
    stream = tasks.stream("test", 0)
    with stream.own_random():
        return nearest_centroid_accuracy(stream.taskset, *sizes, num_tasks=max(2, number))


def _save(
    run: Any, training: Training, test: Interval, centroid: Interval, output: str
) -> Path:
    """The artifacts, in a folder of the run's own and in the database."""
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)
    learner = training.learner
    state = {
        "backbone": learner.backbone.state_dict(),
        "head": learner.algorithm.head.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
    }
    torch.save(state, folder / "parameters.pt")
    title = (
        "{tasks[name]}, {tasks[ways]}-way {tasks[shots]}-shot, {algorithm[name]}, "
        "step={algorithm[step]}, K={algorithm[steps]}, seed {seed}"
    )
    picture = folder / "learning_curve.png"
    learning_curve.draw(
        picture,
        title.format(**run.config),
        training.steps,
        training.validations,
        centroid,
        test,
    )
    run.add_artifact(folder / "parameters.pt")
    run.add_artifact(picture)
    return folder


def _report(
    run: Any,
    training: Training,
    test: Interval,
    centroid: Interval,
    number: int,
    folder: Path,
) -> dict[str, float]:
    """Record and print what the run found."""
    seconds = sorted(step.seconds for step in training.steps)[len(training.steps) // 2]
    result = {
        "test_accuracy": test.mean,
        "test_half_width": test.half_width,
        "centroid_accuracy": centroid.mean,
        "centroid_half_width": centroid.half_width,
        "step_seconds": seconds,
        "step_peak_bytes": float(training.peak),
    }
    run.info["result"] = result
    where = _where(run)
    peak, process = training.peak / 2**20, process_peak() / 2**20
    print(
        f"\ntest accuracy    {test} over {number} new tasks (95 % interval)\n"
        f"raw pixels       {centroid} with nearest centroid on the same tasks\n"
        f"outer step       {seconds:.3f} s (median), {peak:.1f} MiB of tensors at its peak "
        f"({process:.0f} MiB the process)\n"
        f"recorded         {where}\n"
        f"learning curve   {folder / 'learning_curve.png'}"
    )
    return result


def _where(run: Any) -> str:
    """Where the run is recorded."""
    if not run.observers:
        return "not recorded (-u)"
    label = run.journal.label
    if label == "embedded":
        return f"run {run._id} of the embedded database; python -m experiments.tracking.serve"
    return f"run {run._id} of {label}"


def _quiet(items: Iterable[int]) -> Iterable[int]:
    return items


def _bar(items: Iterable[int]) -> Iterator[int]:
    return iter(tqdm(items, unit="task", desc="meta-testing"))


@ex.automain
def train(
    _run: Any,
    _config: Mapping[str, Any],
    iterations: int,
    meta_batch: int,
    meta_lr: float,
    validate_every: int,
    validation_tasks: int,
    test_tasks: int,
    threads: int,
    output: str,
    seed: int,
) -> dict[str, float]:
    """The whole run; returns the test accuracy with its interval."""
    _check(_config)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tasks = make_tasks()
    backbone, width = make_backbone(tasks.image_shape())
    channels_last = _config["model"]["channels_last"]
    learner = MetaLearner(backbone, make_algorithm(width, tasks.ways), meta_lr, channels_last)
    training = Training(_run, learner, tasks, seed)
    training.loop(iterations, meta_batch, validate_every, validation_tasks)
    test = learner.evaluate(tasks.stream("test", 0), test_tasks, _bar)
    sizes = (tasks.ways, tasks.shots, tasks.queries)
    centroid = Interval(*_centroid(tasks, sizes, test_tasks))
    folder = _save(_run, training, test, centroid, output)
    return _report(_run, training, test, centroid, test_tasks, folder)
