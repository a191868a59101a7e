"""What a run has recorded: its validations and tests, which of them counts, and every metric."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from experiments.training.meta_learner import Diverged, Interval, MetaLearner


class BestTheta:
    """Theta at the best validation: what early stopping would have kept.

    Args:
        learner: whose theta it is.

    Attributes:
        iteration: the outer iteration of that validation; 0 before the first.
        seconds: of training until then.
    """

    def __init__(self, learner: MetaLearner) -> None:
        self._learner = learner
        self.iteration, self.seconds = 0, 0.0
        self._score, self._theta = 0.0, dict[str, Any]()

    def offer(self, iteration: int, seconds: float, score: float) -> None:
        """Keep theta as it is now if no validation before this one was as good."""
        if self.iteration == 0 or self._learner.measure.better(score, self._score):
            self.iteration, self.seconds, self._score = iteration, seconds, score
            self._theta = deepcopy(self._learner.theta_state())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The learner has this theta within the block, and its own again after it."""
        own = deepcopy(self._learner.theta_state())
        try:
            self._learner.load_theta_state(self._theta)
            yield
        finally:
            self._learner.load_theta_state(own)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"iteration": self.iteration, "seconds": self.seconds,
                "score": self._score, "theta": self._theta}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self._score, self._theta = state["score"], state["theta"]


class Scores:
    """Theta's scores on the validation and test tasks, each measured and recorded once.

    Args:
        learner: theta.
        evaluate: the score on the tasks of a mode, and what else to record of it.
        record: takes note of values at an outer iteration.
        early_stopping: whether theta of the best validation is tested too.

    Attributes:
        validations: (iteration, score) pairs.
        tests: test score by outer iteration.
        result: the test score that counts, once it is there.
        best: theta of the best validation before it; None unless early stopping is asked for.
        stopped: its test score, once it is there.
    """

    def __init__(
        self,
        learner: MetaLearner,
        evaluate: Callable[[str], tuple[Interval, dict[str, float]]],
        record: Callable[[dict[str, Any], int], None],
        early_stopping: bool,
    ) -> None:
        self._evaluate, self._record_values, self._measure = evaluate, record, learner.measure
        self.validations: list[tuple[int, Interval]] = []
        self.tests: dict[int, Interval] = {}
        self.result: Interval | None = None
        self.best = BestTheta(learner) if early_stopping else None
        self.stopped: Interval | None = None

    def validated(self, iteration: int) -> bool:
        """Whether the last validation was at this iteration."""
        return bool(self.validations) and self.validations[-1][0] == iteration

    def validate(self, iteration: int, seconds: float) -> Interval:
        """On validation tasks, after so many seconds of training.

        Raises:
            Diverged: theta left the finite numbers.
        """
        score, more = self._evaluate("validation")
        self.validations.append((iteration, score))
        if self.best is not None and self.result is None:
            self.best.offer(iteration, seconds, score.mean)
        self._record("validation", score, iteration, seconds, more)
        return score

    def test(self, iteration: int, seconds: float, failed: Callable[[str], None]) -> Interval:
        """On test tasks, once an iteration; not a number, and ``failed`` told, if it diverges."""
        if iteration not in self.tests:
            self.tests[iteration], more = self._test(f"after outer iteration {iteration}", failed)
            self._record("test", self.tests[iteration], iteration, seconds, more)
        return self.tests[iteration]

    def test_best(self, failed: Callable[[str], None]) -> None:
        """Theta of the best validation, if there is one and it is asked for."""
        if (best := self.best) is None or not best.iteration or self.stopped is not None:
            return
        more: Mapping[str, float] = {}
        score = self.tests.get(best.iteration)
        if score is None:
            with best.in_place():
                score, more = self._test(f"of outer iteration {best.iteration}", failed)
        self._record("early_stopped", score, best.iteration, best.seconds, more)
        self.stopped = score

    def _test(self, which: str, failed: Callable[[str], None]) -> tuple[Interval, dict[str, float]]:
        try:
            return self._evaluate("test")
        except Diverged as reason:
            failed(f"in the test {which}: {reason}")
            return Interval(math.nan, math.nan), {}

    def _record(
        self, part: str, score: Interval, at: int, seconds: float, more: Mapping[str, float]
    ) -> None:
        mean = {self._measure.name: score.mean}
        values = {**mean, "half_width": score.half_width, "training_seconds": seconds, **more}
        self._record_values({f"{part}/{name}": value for name, value in values.items()}, at)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "validations": [(at, *score) for at, score in self.validations],
            "tests": [(at, *score) for at, score in self.tests.items()],
            "result": None if self.result is None else tuple(self.result),
            "best": None if self.best is None else self.best.state_dict(),
            "stopped": None if self.stopped is None else tuple(self.stopped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.validations = [(at, Interval(*score)) for at, *score in state["validations"]]
        self.tests = {at: Interval(*score) for at, *score in state["tests"]}
        self.result, self.stopped = (
            None if state[name] is None else Interval(*state[name])
            for name in ("result", "stopped")
        )
        if self.best is not None:
            self.best.load_state_dict(state["best"])


_KINDS = {"q": torch.int64, "d": torch.float64}


class Column:
    """One metric's values, 8 bytes each, so that long runs do not grow: whole numbers until a
    fraction comes, by outer iteration.

    Iterations that follow one another are not kept one by one.
    """

    def __init__(self, first: int, kind: str) -> None:
        self.values: array[Any] = array(kind)
        self._first = first
        self._at: array[int] | None = None

    def add(self, iteration: int, value: float) -> None:
        """The value of an iteration."""
        if not isinstance(value, int) and self.values.typecode == "q":
            self.values = array("d", self.values)
        if self._at is None and iteration != self._first + len(self.values):
            self._at = array("q", self.iterations())
        if self._at is not None:
            self._at.append(iteration)
        self.values.append(value)

    def iterations(self) -> Sequence[int]:
        """Of the values."""
        return self._at or range(self._first, self._first + len(self.values))

    def state(self) -> tuple[int, torch.Tensor | None, torch.Tensor]:
        """As plain data: the first iteration, all of them if they do not follow it, the values."""
        at = None if self._at is None else torch.tensor(self._at)
        return self._first, at, torch.tensor(self.values, dtype=_KINDS[self.values.typecode])

    @classmethod
    def of(cls, first: int, at: torch.Tensor | None, values: torch.Tensor) -> Column:
        """The inverse of `state`."""
        column = cls(first, {dtype: kind for kind, dtype in _KINDS.items()}[values.dtype])
        column.values.extend(values.tolist())
        column._at = None if at is None else array("q", at.tolist())
        return column


class History:
    """Values of metrics by outer iteration, a column for every metric.

    Example:
        >>> from experiments.training.scores import History
        >>> history = History()
        >>> history.add({"train/loss": 0.5}, iteration=1)
        >>> list(history.values("train/loss"))
        [0.5]
    """

    def __init__(self) -> None:
        self._columns: dict[str, Column] = {}

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """One value of each of these metrics."""
        for name, value in values.items():
            if name not in self._columns:
                self._columns[name] = Column(iteration, "q" if isinstance(value, int) else "d")
            self._columns[name].add(iteration, value)

    def values(self, name: str) -> Sequence[float]:
        """A metric's values in the order in which they came; none if it was never recorded."""
        return self._columns[name].values if name in self._columns else array("d")

    def points(self) -> Iterator[tuple[str, int, float]]:
        """Every name, iteration and value; those of one metric in their order."""
        for name, column in self._columns.items():
            for iteration, value in zip(column.iterations(), column.values, strict=True):
                yield name, iteration, value

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors, by name."""
        return {name: column.state() for name, column in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._columns = {name: Column.of(*column) for name, column in state.items()}
