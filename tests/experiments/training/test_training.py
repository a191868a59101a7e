"""When a run validates, tests and ends; the learner is a stand-in whose steps cost what is said."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_process import Bench

from experiments.training import checkpoint, outcome
from experiments.training.episodes import Episode
from experiments.training.loop import Schedule, Training
from experiments.training.meta_learner import COUNTS, MEASURES, Diverged, Interval
from experiments.training.scores import BestTheta
from l2l_implicit.distributed import ALONE

pytest_plugins = ("train_process",)


class Run:
    """Takes note of what is recorded."""

    unobserved = False

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = {}

    def log_scalar(self, name: str, value: float, step: int) -> None:
        self.values.setdefault(name, []).append((step, value))

    def at(self, name: str) -> list[int]:
        return [step for step, _ in self.values.get(name, [])]


class Learner:
    """Every step takes 2 s of the process and 3 s of the wall."""

    measure, device, ranks = MEASURES["classification"], torch.device("cpu"), ALONE
    done, skip, skipped = 0, False, 0
    diverges_at: int | None = None  # the step that does
    fails_test_at: int | None = None  # after so many steps the test does, or the validation
    fails_validation_at: int | None = None
    unsolved: int | None = None  # systems of every step

    def __init__(
        self, score: Callable[[int], float] = lambda steps: steps / 100, **changes: int
    ) -> None:
        self.__dict__.update(changes)
        self.score, self.tested, self.annealed = score, list[int](), list[float]()
        self.algorithms = SimpleNamespace(training=SimpleNamespace(network=nn.Module()))
        self.optimizer = torch.optim.SGD([torch.zeros(1)])
        self.anneal = self.annealed.append

    def hypergradient(self, batch: list[Any]) -> None:
        pass

    def step(self, batch: list[Any]) -> dict[str, float]:
        if self.done + 1 == self.diverges_at:
            raise Diverged("too large a step")
        self.done += 1
        noted = {"query_loss": 1.0, "query_accuracy": 0.5, "seconds": 3.0, "cpu_seconds": 2.0}
        return noted | {name: self.unsolved for name in COUNTS if self.unsolved is not None}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]

    theta_state, load_theta_state = state_dict, load_state_dict

    def evaluate(self, stream: Any, number: int, progress: Callable[[range], range]) -> Interval:
        if stream.sample().inputs.numel() == TEST_SIZE:
            self.tested.append(self.done)
            if self.done == self.fails_test_at:
                raise Diverged("too large a loss")
        elif self.done == self.fails_validation_at:
            raise Diverged("too large a loss")
        return Interval(self.score(self.done), 0.01)


TEST_SIZE = 3


class Tasks:
    def stream(self, mode: str, *options: Any) -> Any:
        labels = torch.zeros(1, dtype=torch.long)
        task = Episode(torch.zeros(TEST_SIZE if mode == "test" else 2), labels, labels)
        return SimpleNamespace(sample=lambda where="": task, state=None, skipped=0)


def schedule(**changes: Any) -> Schedule:
    usual = {"iterations": 10, "meta_batch": 1, "validate_every": 4, "validation_tasks": 3,
             "test_tasks": 5, "checkpoint_seconds": 1e9}  # fmt: skip
    return Schedule.of({**usual, **changes})


def train(tmp_path: Path, learner: Learner | None = None, **changes: Any) -> tuple[Training, Run]:
    run, given = Run(), schedule(**changes)
    training = Training(run, learner or Learner(), Tasks(), given, 0, tmp_path)  # type: ignore[arg-type]
    training.loop()
    return training, run


@pytest.mark.parametrize(("settings", "seconds", "validated", "tested", "result"), [
    ({}, 20.0, [4, 8, 10], [10], 0.1), ({"validate_seconds": 5.0}, 20.0, [3, 6, 9, 10], [10], 0.1),
    ({"budget": 7.0, "budget_clock": "cpu"}, 8.0, [4], [4], 0.04),
    ({"budget": 7.0, "budget_clock": "wall"}, 9.0, [3], [3], 0.03),
    ({"budget": 7.0, "test_at": (2, 6)}, 12.0, [4, 6], [2, 4, 6], 0.04),
])  # fmt: skip
def test_when_a_run_validates_tests_and_ends(
    tmp_path: Path, settings: Any, seconds: float, validated: Any, tested: Any, result: float
) -> None:
    """By iterations or the clock that is asked for; the result is that at the budget's end."""
    training, run = train(tmp_path, **settings)
    assert (training.steps, training.seconds) == (tested[-1], seconds)
    assert run.at("validation/accuracy") == validated and run.at("test/accuracy") == tested
    assert training.scores.result == Interval(result, 0.01)
    assert run.at("train/step_peak_bytes") == [n for n in (1, 5, 9) if n <= tested[-1]]


@pytest.mark.parametrize(("budget", "shares"), [
    (None, [n / 10 for n in range(10)]), (7.0, [0, 2 / 7, 4 / 7, 6 / 7]), (3.0, [0, 2 / 3, 1, 1]),
])  # fmt: skip
def test_the_outer_step_decays_over_what_ends_the_run(
    tmp_path: Path, budget: float | None, shares: list[float]
) -> None:
    test_at = (4,) if budget == 3.0 else ()  # past the budget
    training, _ = train(tmp_path, meta_lr_schedule="cosine", budget=budget, test_at=test_at)
    assert training.learner.annealed == pytest.approx(shares)  # type: ignore[attr-defined]
    constant, _ = train(tmp_path, budget=budget)
    assert not constant.learner.annealed  # type: ignore[attr-defined]


def test_early_stopping_looks_no_further_than_the_result(tmp_path: Path) -> None:
    learner, settings = Learner(), {"budget": 7.0, "test_at": (2, 6), "validate_every": 1}
    training, run = train(tmp_path, learner, **settings, early_stopping=True)
    assert training.scores.stopped == Interval(0.04, 0.01) and training.scores.result is not None
    assert run.values["early_stopped/accuracy"] == [(4, 0.04)]
    assert run.values["early_stopped/training_seconds"] == [(4, 8.0)]
    assert learner.tested == [2, 4, 6]  # theta of the best validation has been tested
    given = schedule(**settings, early_stopping=True)
    resumed = Training(Run(), Learner(), Tasks(), given, 0, tmp_path)  # type: ignore[arg-type]
    resumed.load_state_dict(checkpoint.load(tmp_path))
    assert resumed.scores.stopped == Interval(0.04, 0.01)


@pytest.mark.parametrize(
    ("kind", "scores", "at"),
    [("classification", [0.3, 0.7, 0.7, 0.2], 2), ("regression", [3.0, 0.7, 0.7, 2.0], 2),
     ("classification", [0.0], 1), ("regression", [math.inf, 2.0], 2)],
)  # fmt: skip
def test_theta_of_the_first_of_the_best_is_kept(kind: str, scores: list[float], at: int) -> None:
    learner = Learner()
    learner.measure = MEASURES[kind]
    best = BestTheta(learner)  # type: ignore[arg-type]
    for learner.done, score in enumerate(scores, 1):
        best.offer(learner.done, 10.0 * learner.done, score)
    assert (best.iteration, best.seconds) == (at, 10.0 * at)
    learner.done = 99
    with pytest.raises(KeyboardInterrupt), best.in_place():
        assert learner.done == at
        raise KeyboardInterrupt
    assert learner.done == 99


def test_it_is_what_a_run_that_ends_there_has(bench: Bench) -> None:
    """Equal to the last digit, and in every parameter, to a run of so many iterations."""
    happens = {"validations": [0.3, 0.2, 0.5, 0.5, 0.4]}  # the third is the first of the best
    more = {"whole": ("iterations=5", "early_stopping=True"), "short": ("iterations=3",)}
    for name, own in more.items():
        words = ("validate_every=1", "validation_tasks=4", "test_tasks=10", f"output={name}", *own)
        process = bench.start("-u", "with", "smoke", *words, happens=happens)
        assert process.wait() == 0, bench.text()
    (early,) = re.findall(r"early stopped +(.+?) with theta of outer iteration 3,", bench.text())
    assert early == re.findall("test accuracy +(.+?) over", bench.text())[1]
    kept, whole, short = (
        torch.load(*bench.folder.glob(f"{name}.pt"), weights_only=True)
        for name in ("whole/*/early_stopped_parameters", "whole/*/parameters", "short/*/parameters")
    )
    assert kept["iteration"] == 3
    same = [[torch.equal(*pair) for pair in zip(kept["theta"], other["theta"], strict=True)]
            for other in (short, whole)]  # fmt: skip
    assert all(same[0]) and not all(same[1])
    assert not list(bench.folder.glob("short/*/early_stopped_parameters.pt"))


def falling(steps: int) -> float:
    return (20 - steps) / 100


@pytest.mark.parametrize("diverges", [False, True])
def test_theta_of_the_best_validation_is_tested_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], diverges: bool
) -> None:
    """Should that diverge, the run itself has not."""
    learner = Learner(score=falling, **{"fails_test_at": 4} if diverges else {})
    training, run = train(tmp_path, learner, early_stopping=True)
    assert training.scores.result == Interval(0.10, 0.01) and training.diverged is None
    assert learner.tested == [10, 4] and learner.done == 10  # it has its own theta again
    assert training.scores.stopped is not None
    if diverges:
        assert math.isnan(training.scores.stopped.mean)
    else:
        assert training.scores.stopped == Interval(0.16, 0.01)
        assert run.values["early_stopped/accuracy"] == [(4, 0.16)]
    said = "not early stopped, in the test of outer iteration 4: too large a loss"
    assert (said in capsys.readouterr().out) == diverges


def test_a_run_without_a_validation_has_nothing_to_stop_at(tmp_path: Path) -> None:
    training, _ = train(tmp_path, Learner(diverges_at=1), early_stopping=True)
    assert training.steps == 0 and training.scores.stopped is None


@pytest.mark.parametrize(("where", "at", "said", "score"), [
    ("diverges_at", 6, "at outer iteration 6: too large a step", 0.05),
    ("fails_validation_at", 8, "in the validation after outer iteration 8: too large a loss", 0.08),
    ("fails_test_at", 10, "in the test after outer iteration 10: too large a loss", math.nan),
])  # fmt: skip
def test_a_run_that_diverges_has_a_result_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, at: int, said: str, score: float
) -> None:
    """Theta's after the last step that was done; a test that diverges itself is not a number."""
    training, _ = train(tmp_path, Learner(**{where: at}))
    assert training.steps == at - (where == "diverges_at")
    assert training.diverged == said and f"diverged {said}" in capsys.readouterr().out
    assert training.scores.result is not None
    assert training.scores.result.mean == pytest.approx(score, nan_ok=True)


@pytest.mark.parametrize("unsolved", [3, 0, None])
def test_unsolved_systems_are_summed_up(tmp_path: Path, unsolved: int | None) -> None:
    training, _ = train(tmp_path, Learner(unsolved=unsolved), meta_batch=4)
    said = "inner problems 30, linear systems 30 of 40 tasks, 30 hypergradients to 1 %"
    said = said if unsolved else ""
    assert outcome.unsolved(training).partition(":")[0] == said
