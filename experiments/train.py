"""Meta-train and meta-test one algorithm on one benchmark: a Sacred experiment.

    python -m experiments.train
    python -m experiments.train with caltech101 anil tasks.root=DATA
    python -m experiments.train print_config with caltech101 maml
    python -m experiments.train resume=latest
    python -m experiments.train evaluate with caltech101 anil parameters=runs/1/parameters.pt
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import extra  # noqa: F401  (first: it says what to install)

# isort: split
import torch
from sacred.config import ConfigDict
from tqdm import tqdm

from experiments.ingredients import algorithm, model, tasks
from experiments.ingredients.algorithm_table import AlgorithmSettings, defaults_of
from experiments.ingredients.model import ModelSettings
from experiments.ingredients.named_configs import all_configs, check_choices
from experiments.tracking import TrackedExperiment, UserError, wrong
from experiments.tracking.config import NotNegative, Positive, Seed, Text, Threads, Values
from experiments.tracking.errors import reason
from experiments.tracking.values import told
from experiments.training import checkpoint, outcome
from experiments.training.episodes import Tasks
from experiments.training.loop import Schedule, Training
from experiments.training.meta_learner import MEASURES, Interval, MetaLearner
from experiments.training.peak_memory import keep_freed_memory
from l2l_implicit.distributed import ALONE, RankLost, Ranks, connect
from l2l_implicit.tasks import nearest_centroid_accuracy


class TrainSettings(Schedule):
    """The settings of a run, beside those of its ingredients."""

    seed: Seed = 0  # of the training tasks and the initial parameters
    # the algorithm's own default: adam, or sgd for reptile and paper
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    meta_lr: Positive = 0.001  # outer step size; the algorithm's own default
    meta_weight_decay: NotNegative = 0.0  # share of theta, times the step size, lost in a step
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    device: Text = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    parameters: Text | None = None  # file of a run's trained parameters, to begin with or evaluate
    output: Text = "runs"  # folder of the learning curve, the trained parameters, the checkpoints
    # with wrong data, or that diverges: stop, the default, or skip
    on_bad_task: Literal["stop", "skip"] | None = None
    resume: Text | None = None  # set by the command line's resume=
    cell: Text | None = None  # of a sweep (python -m experiments.sweep)

    @classmethod
    def own_defaults(cls, given: Values, others: Values) -> Values:
        its = others.get("algorithm", {})
        return defaults_of(its.get("name"), its.get("variant"))


class ResumableExperiment(TrackedExperiment):
    """An experiment that takes the settings of the run which ``resume=`` names."""

    def _create_run(self, command_name: str | None = None, config_updates: Values | None = None,
                    named_configs: Sequence[str] = (), **options: Any) -> Any:  # fmt: skip
        updates = dict(config_updates or {})
        check_choices(named_configs)
        if updates.get("resume") is not None:
            output = Path(str(updates.get("output", "runs")))
            folder = checkpoint.find(output, str(updates["resume"]))
            settings = checkpoint.load(folder)["settings"]
            with checkpoint.in_one_line(folder / checkpoint.STATE):
                self.named_configs["resumed"] = ConfigDict(settings)
            if _first() and command_name in (None, "train"):
                checkpoint.lock(folder)
            named_configs, updates["resume"] = ["resumed", *named_configs], str(folder)
        run = super()._create_run(command_name, updates, named_configs, **options)
        task, method, seed = (run.config[part] for part in ("tasks", "algorithm", "seed"))
        name = " ".join(filter(None, (task["name"], method["name"], method["variant"])))
        run.meta_info.setdefault("comment", f"{name}, seed {seed}")  # what Omniboard shows
        return run


ex = ResumableExperiment(
    "train",
    ingredients=[tasks.tasks, model.model, algorithm.algorithm],
    settings=TrainSettings,
)
for _name, _settings in all_configs().items():
    ex.add_named_config(_name, _settings)


def _learner(config: Values, given: Tasks, ranks: Ranks) -> MetaLearner:
    """Theta with its algorithm, on the tasks' inputs and outputs."""
    measure, device = MEASURES[given.kind], model.device_of(config["device"])
    network, method = ModelSettings.of(config["model"]), AlgorithmSettings.of(config["algorithm"])
    if network.precision != "float32" and method.curvature is not None:
        expected = (f"float32 for {method.name}, whose inner problem holds the backbone and is not"
                    " solved in bfloat16's three digits")
        raise wrong("model.precision", expected, repr(network.precision))
    if method.test_crops is not None and len(given.input_shape()) != 3:
        raise wrong("algorithm.test_crops", f"none for {given.name}, which has no images", 10)
    backbone, width = model.build_backbone(given.input_shape(), network)
    backbone.to(device)
    outputs = given.sizes("train").ways, given.sizes("test").ways
    algorithms = algorithm.make_algorithms(method, backbone, width, *outputs, measure.loss, device)
    return MetaLearner(
        algorithms, measure, config["meta_optimizer"], config["meta_lr"], network.channels_last,
        ranks, config["on_bad_task"] == "skip", tqdm.write, config["meta_weight_decay"],
    )  # fmt: skip


def _prepare(config: Values, ranks: Ranks) -> tuple[Tasks, MetaLearner]:
    """The tasks, and theta as it is before the first outer iteration."""
    model.use_threads(config["threads"])
    torch.manual_seed(config["seed"])
    given = tasks.make_tasks(**config["tasks"])
    learner = _learner(config, given, ranks)
    if (file := config["parameters"]) is not None:
        try:
            if Path(file).exists() and not Path(file).is_file():
                raise OSError("no regular file, which may be waited for")
            learner.load_parameters(checkpoint.plain_data(Path(file).read_bytes()))
        except Exception as error:  # torch's reader of plain data raises what its bytes lead to
            raise wrong("parameters", "those of a run with this model and algorithm",
                        f"{file}: {reason(error)}",
                        "give its settings, or leave parameters out") from error
    return given, learner


def _centroid(given: Tasks, number: int) -> Interval | None:
    """Nearest centroid on the raw pixels of the same test tasks."""
    if given.kind != "classification":
        return None
    stream = given.stream("test", 0)
    with stream.own_random():
        sizes = given.sizes("test")
        return Interval(*nearest_centroid_accuracy(stream.taskset, *sizes, max(2, number)))


def _first() -> bool:
    """Whether this is the process that records and speaks for all."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _resume(run: Any, training: Training, folder: Path, state: Values) -> None:
    """Go on where a killed run left its checkpoint, and let each of the two name the other."""
    ranks, iterations = training.learner.ranks, training.schedule.iterations
    with checkpoint.in_one_line(folder / checkpoint.STATE):
        training.load_state_dict(state)
        checkpoint.restore_generators(state["generators"])
        before = state["settings"]["iterations"]
    tested = training.scores.result is not None
    if iterations != before and (tested or training.steps >= iterations):
        more = f"before the test more than the {training.steps} that are done"
        raise wrong("resume", f"iterations={before}, or {more}", iterations)
    ranks.gather(None)  # every rank has read it
    if ranks.first:
        checkpoint.save(training.folder, training.state_dict())
        run.info["resumes"] = folder.name
        if run.journal is not None:
            run.journal.supersede(state["token"], run.info)
        checkpoint.remove(folder)  # only now: one of the two is there at any moment
        print(f"resumed          run {told(folder.name)} after {training.steps} outer iterations")


@ex.main
def train(_run: Any, _config: Values) -> dict[str, Any]:
    """The whole run, and its result; under torchrun each rank has its share of the tasks."""
    try:
        with model.within_limits(), ExitStack() as job:
            try:
                ranks = job.enter_context(connect())
            except ValueError as bad:
                raise wrong("RANK, WORLD_SIZE", "torchrun's", reason(bad), "unset them") from bad
            return _train(_run, _config, ranks)
    except RankLost as error:
        raise UserError(str(error)) from error


def _train(run: Any, config: Values, ranks: Ranks) -> dict[str, Any]:
    old = None if config["resume"] is None else Path(config["resume"])
    if old is not None:
        if ranks.first and os.path.exists(old / checkpoint.STATE):
            checkpoint.lock(old)  # a file of settings may name it
        state = checkpoint.load(old)  # while nobody else can go on with it
        checkpoint.check_settings(state["settings"], config)
    run.info["keeps_freed_memory"] = keep_freed_memory()
    given, learner = _prepare(config, ranks)
    run.info["tasks"], folder = given.describe(), Path(config["output"])
    if ranks.first:
        folder = outcome.folder_of(run, config["output"])
        text = checkpoint.settings_text(config).encode()
        checkpoint.replace(folder / checkpoint.CONFIG, lambda file: file.write(text))
    schedule = Schedule.of({name: config[name] for name in Schedule.model_fields})
    training = Training(run, learner, given, schedule, config["seed"], folder)
    if old is not None:
        _resume(run, training, old, state)
    training.loop()
    if not ranks.first:
        return {}
    centroid = _centroid(given, config["test_tasks"])
    try:
        outcome.save(run, training, centroid)
    except OSError as error:
        raise UserError(f"output: expected to write to {folder}, got {error}") from error
    result = outcome.summary(training, centroid)
    run.info["result"] = result
    outcome.announce(run, training, result, centroid)
    return result


@ex.command(unobserved=True)
def evaluate(_config: Values) -> float:
    """Test a run's trained parameters on test tasks, and train nothing; nothing is recorded."""
    if (folder := _config["resume"]) is not None:
        todo = f"give parameters={folder}/parameters.pt, which a run has at its end"
        raise wrong("resume", "no run to go on with", repr(folder), todo)
    with model.within_limits():
        given, learner = _prepare(_config, ALONE)
        stream = given.stream("test", 0, learner.skip, tqdm.write)
        progress = partial(tqdm, desc="meta-testing", unit="task", leave=False)
        score = learner.evaluate(stream, _config["test_tasks"], progress)
    shown = f"{learner.measure.show(score)} over {_config['test_tasks']} new tasks"
    print(f"test {learner.measure.name:11} {shown} (95 % interval)")
    return score.mean


def main(argv: Sequence[str]) -> None:
    """The command line: Sacred's, and ``resume=``."""
    arguments = list(argv)
    if "with" not in arguments and any(word.startswith("resume=") for word in arguments):
        first = next(n for n, word in enumerate(arguments[1:], 1) if re.match(r"[\w.]+=", word))
        arguments.insert(first, "with")
    for option in () if _first() else ("-lERROR", "-u"):
        if option[:2] not in arguments:
            arguments.insert(1, option)
    ex.run_commandline(arguments)


if __name__ == "__main__":
    main(sys.argv)
