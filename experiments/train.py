"""Meta-train and meta-test one algorithm on one benchmark: a Sacred experiment.

    python -m experiments.train
    python -m experiments.train with caltech101 anil tasks.root=DATA
    python -m experiments.train print_config with caltech101 maml
    python -m experiments.train resume=latest
"""

# ruff: noqa: E402, F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from sacred.config import ConfigDict
from tqdm import tqdm

from experiments.ingredients import algorithm, model, named_configs, tasks
from experiments.ingredients.algorithm_table import settings_of
from experiments.tracking import TrackedExperiment, UserError
from experiments.training import checkpoint, outcome
from experiments.training.allocator import keep_freed_memory
from experiments.training.bad_tasks import POLICIES
from experiments.training.episodes import Tasks
from experiments.training.loop import Schedule, Training
from experiments.training.meta_learner import MEASURES, Interval, Measure, MetaLearner
from l2l_implicit import Chunked, checks
from l2l_implicit.distributed import RankLost, Ranks, connect, own_device
from l2l_implicit.tasks import nearest_centroid_accuracy

_TYPES: dict[str, Any] = {
    "validate_seconds": float | None,
    "budget": float | None,
    "cell": str | None,
    "score": str | None,
    "on_bad_task": str | None,
    "resume": str | None,
    **{f"tasks.{key}": kind for key, kind in tasks.TYPES.items()},
    **{f"model.{key}": kind for key, kind in model.TYPES.items()},
    **{f"algorithm.{key}": kind for key, kind in algorithm.TYPES.items()},
}


class ResumableExperiment(TrackedExperiment):
    """An experiment that takes the settings of the run which ``resume=`` names."""

    def _create_run(self, command_name: str | None = None,
                    config_updates: Mapping[str, Any] | None = None,
                    named_configs: Sequence[str] = (), *more: Any, **options: Any) -> Any:
        updates = dict(config_updates or {})
        if updates.get("resume") is not None:
            output = Path(str(updates.get("output", "runs")))
            folder = checkpoint.find(output, str(updates["resume"]))
            if _first():
                checkpoint.lock(folder)
            with checkpoint.in_one_line(folder / checkpoint.STATE):
                self.named_configs["resumed"] = ConfigDict(checkpoint.load(folder)["settings"])
            named_configs, updates["resume"] = ["resumed", *named_configs], str(folder)
        return super()._create_run(command_name, updates, named_configs, *more, **options)


ex = ResumableExperiment(
    "train", ingredients=[tasks.tasks, model.model, algorithm.algorithm], types=_TYPES
)
named_configs.register(ex)

COUNTS = ("iterations", "meta_batch", "validate_every", "validation_tasks", "test_tasks")


@ex.config
def defaults(algorithm: dict[str, Any]) -> None:
    iterations = 600  # outer iterations, at most
    meta_batch = 8  # tasks an outer iteration, |B|
    _own = settings_of(algorithm["name"], algorithm["variant"])
    meta_optimizer = _own["meta_optimizer"]  # adam or sgd
    meta_lr = _own["meta_lr"]  # outer step size
    validate_every = 100  # outer iterations
    validate_seconds = None  # seconds of training between validations, instead
    validation_tasks = 100
    test_tasks = 600
    score = None  # what is reported: accuracy (classification) or mse (regression); None: its own
    test_at = ()  # outer iterations at which the test score is recorded besides
    early_stopping = False  # test theta of the best validation besides, and keep it
    budget = None  # seconds of training whose test score is the result; None: no limit
    budget_clock = "cpu"  # cpu (of this process, whatever else the machine does) or wall
    threads = 1  # of torch; 0 leaves torch's own choice
    device = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    output = "runs"  # folder of the learning curve, the trained parameters, the checkpoints
    checkpoint_seconds = 60.0  # between checkpoints
    on_bad_task = None  # with wrong data, or that diverges: stop, the default, or skip
    resume = None  # set by the command line's resume=
    cell = None  # of a sweep (python -m experiments.sweep)
    seed = 0


def _check(config: Mapping[str, Any]) -> None:
    try:
        for name in COUNTS:
            checks.count(name, config[name])
        for iteration in config["test_at"]:
            checks.count("test_at", iteration)
        checks.positive("meta_lr", config["meta_lr"])
        checks.positive("checkpoint_seconds", config["checkpoint_seconds"])
        for name in ("budget", "validate_seconds"):
            if config[name] is not None:
                checks.positive(name, config[name])
        checks.choice("meta_optimizer", config["meta_optimizer"], ("adam", "sgd"))
        checks.choice("budget_clock", config["budget_clock"], ("cpu", "wall"))
        checks.choice("on_bad_task", config["on_bad_task"] or "stop", POLICIES)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config["threads"] < 0:
        raise UserError(
            f"threads: expected at least 0, got {config['threads']}; 0 is torch's own choice"
        )


def _schedule(config: Mapping[str, Any]) -> Schedule:
    return Schedule(
        iterations=config["iterations"],
        batch=config["meta_batch"],
        validate_every=config["validate_every"],
        validate_seconds=config["validate_seconds"],
        validation_tasks=config["validation_tasks"],
        test_tasks=config["test_tasks"],
        test_at=tuple(config["test_at"]),
        budget=config["budget"],
        cpu=config["budget_clock"] == "cpu",
        checkpoint_seconds=config["checkpoint_seconds"],
        early_stopping=config["early_stopping"],
    )


def _learner(config: Mapping[str, Any], given: Tasks, ranks: Ranks) -> MetaLearner:
    """Theta with its algorithm, on the tasks' inputs and outputs."""
    measure = _measure(given, config["score"])
    backbone, width = model.make_backbone(given.input_shape())
    device = _device(config["device"])
    backbone.to(device)
    if isinstance(backbone, Chunked):
        _check_chunks(backbone, given, config["algorithm"]["batch_norm"] == "together")
    algorithms = algorithm.make_algorithms(
        config["algorithm"],
        backbone,
        width,
        given.outputs("train"),
        given.outputs("test"),
        measure.loss,
        device,
    )
    return MetaLearner(
        algorithms,
        measure,
        config["meta_optimizer"],
        config["meta_lr"],
        config["model"]["channels_last"],
        ranks,
        config["on_bad_task"] == "skip",
        tqdm.write,
    )


def _measure(given: Tasks, score: str | None) -> Measure:
    """How tasks of this kind are learnt and judged."""
    measure = MEASURES[given.kind]
    if score not in (None, measure.name):
        raise UserError(
            f"score: expected {measure.name!r} for {given.name}, a {given.kind}, got {score!r}; "
            "leave it out"
        )
    return measure


def _device(name: str) -> torch.device:
    try:
        if name == "auto":
            return own_device()
        device = torch.device(name)
        torch.zeros(1, device=device)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device: expected auto, cpu or a GPU that is there, got {name!r} ({reason}); try cpu"
        ) from error
    return device


def _check_chunks(backbone: Chunked, given: Tasks, together: bool) -> None:
    for ways, shots, queries in (given.sizes("train"), given.sizes("test")):
        try:
            backbone.check_batch(ways * (shots + queries if together else max(shots, queries)))
        except ValueError as error:
            raise UserError(f"model.{error}") from error


def _centroid(given: Tasks, number: int) -> Interval | None:
    """Nearest centroid on the raw pixels of the same test tasks."""
    if given.kind != "classification":
        return None
    stream = given.stream("test", 0)
    with stream.own_random():
        sizes = given.sizes("test")
        return Interval(*nearest_centroid_accuracy(stream.taskset, *sizes, max(2, number)))


def _folder(run: Any, output: str, ranks: Ranks) -> Path:
    """The run's own folder, which rank 0 makes and writes to."""
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    return checkpoint.new_folder(Path(output), name) if ranks.first else Path(output) / name


def _first() -> bool:
    """Whether this is the process that records and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def _resume(run: Any, training: Training, folder: Path, state: Mapping[str, Any]) -> None:
    """Go on where a killed run left its checkpoint, and let each of the two name the other."""
    ranks, iterations = training.learner.ranks, training.schedule.iterations
    with checkpoint.in_one_line(folder / checkpoint.STATE):
        training.load_state_dict(state)
        checkpoint.restore_generators(state["generators"])
        before = state["settings"]["iterations"]
    tested = training.scores.result is not None
    if iterations != before and (tested or training.steps >= iterations):
        raise UserError(
            f"resume: expected iterations={before}, or before the test more than the "
            f"{training.steps} that are done, got {iterations}; leave it out"
        )
    ranks.gather(None)  # every rank has read it
    if not ranks.first:
        return
    checkpoint.save(training.folder, training.state_dict())
    run.info["resumes"] = folder.name
    if run.journal is not None:
        run.journal.supersede(state["token"], run.info)
    checkpoint.remove(folder)  # only now: one of the two is there at any moment
    print(f"resumed          run {folder.name} after {training.steps} outer iterations")


@ex.main
def train(_run: Any, _config: Mapping[str, Any], output: str, seed: int) -> dict[str, Any]:
    """The whole run; returns the test score with its interval.

    Under torchrun every rank does it with its share of the tasks, and rank 0 records it.
    """
    _check(_config)
    try:
        with connect() as ranks:
            return _train(_run, _config, output, seed, ranks)
    except RankLost as error:
        raise UserError(str(error)) from error


def _train(
    run: Any, config: Mapping[str, Any], output: str, seed: int, ranks: Ranks
) -> dict[str, Any]:
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    old = None if config["resume"] is None else Path(config["resume"])
    if old is not None:
        if ranks.first:
            checkpoint.lock(old)  # a file of settings may name it
        state = checkpoint.load(old)
        checkpoint.check_settings(state["settings"], config)
    run.info["keeps_freed_memory"] = keep_freed_memory()
    torch.manual_seed(seed)
    given = tasks.make_tasks()
    run.info["tasks"] = given.describe()
    learner, folder = _learner(config, given, ranks), _folder(run, output, ranks)
    if ranks.first:
        checkpoint.write_config(folder, config)
    training = Training(run, learner, given, _schedule(config), seed, folder)
    if old is not None:
        _resume(run, training, old, state)
    training.loop()
    if not ranks.first:
        return {}
    centroid = _centroid(given, config["test_tasks"])
    outcome.save(run, training, centroid)
    result = outcome.summary(training, centroid)
    run.info["result"] = result
    outcome.announce(run, training, result, centroid)
    run.afterwards.append(partial(checkpoint.remove, folder))
    return result


def main(argv: Sequence[str]) -> None:
    """The command line: Sacred's, and ``resume=``."""
    arguments = list(argv)
    if "with" not in arguments and any(word.startswith("resume=") for word in arguments):
        arguments.insert(1, "with")
    if not _first():
        quiet = {"-u": ["-u"], "-l": ["-l", "ERROR"]}
        own = [w for option, words in quiet.items() if option not in arguments for w in words]
        arguments = [arguments[0], *own, *arguments[1:]]
    ex.run_commandline(arguments)


if __name__ == "__main__":
    main(sys.argv)
