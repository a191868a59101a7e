"""What a run has recorded: its validations and tests, which of them counts, and every metric."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.training.meta_learner import Interval, MetaLearner


class BestTheta:
    """Theta at the best validation, after so many outer iterations (0: there was none) and seconds
    of training: what early stopping would have kept."""

    def __init__(self, learner: MetaLearner) -> None:
        self._learner = learner
        self.iteration, self.seconds, self.score, self.theta = 0, 0.0, 0.0, dict[str, Any]()

    def offer(self, iteration: int, seconds: float, score: float) -> None:
        """Keep theta as it is now if no validation before this one was as good."""
        if self.iteration == 0 or self._learner.measure.better(score, self.score):
            self.iteration, self.seconds, self.score = iteration, seconds, score
            self.theta = deepcopy(self._learner.theta_state())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The learner has this theta within the block, and its own again after it."""
        own = deepcopy(self._learner.theta_state())
        try:
            self._learner.load_theta_state(self.theta)
            yield
        finally:
            self._learner.load_theta_state(own)

    def state_dict(self) -> dict[str, Any]:
        """Plain data, of which `load_state_dict` is the inverse."""
        return {name: value for name, value in vars(self).items() if name != "_learner"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class Scores:
    """Theta's scores on the validation and test tasks, each measured once."""

    def __init__(self, learner: MetaLearner, early_stopping: bool) -> None:
        self.validations, self.tests = list[tuple[int, Interval]](), dict[int, Interval]()
        self.result: Interval | None = None  # the test score that counts, once it is there
        self.best = BestTheta(learner) if early_stopping else None  # of validations before it
        self.stopped: Interval | None = None  # the test score of that theta

    def state_dict(self) -> dict[str, Any]:
        """Plain data, of which `load_state_dict` is the inverse."""
        return {
            "validations": [(at, *score) for at, score in self.validations],
            "tests": [(at, *score) for at, score in self.tests.items()],
            "result": self.result and tuple(self.result),
            "stopped": self.stopped and tuple(self.stopped),
            "best": self.best and self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        scores = {part: [(int(at), Interval(*map(float, score))) for at, *score in state[part]]
                  for part in ("validations", "tests")}  # fmt: skip
        self.validations, self.tests = scores["validations"], dict(scores["tests"])
        for name in ("result", "stopped"):
            setattr(self, name, state[name] and Interval(*map(float, state[name])))
        if self.best is not None:
            self.best.load_state_dict(state["best"])


class History:
    """Values of metrics by outer iteration, 8 bytes each, so that long runs do not grow.

    Those of a metric are whole numbers until a fraction comes. Of iterations that follow each other
    the first and the last are kept.
    """

    def __init__(self) -> None:
        self._columns: dict[str, tuple[list[range], array[Any]]] = {}

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """One value of each of these metrics."""
        for name, value in values.items():
            kind = "q" if isinstance(value, int) else "d"
            spans, its = self._columns.get(name, ([], array(kind)))
            if kind == "d" and its.typecode == "q":
                its = array("d", its)
            follows = bool(spans) and iteration == spans[-1].stop
            start = spans.pop().start if follows else iteration
            spans.append(range(start, iteration + 1))
            its.append(value)
            self._columns[name] = spans, its

    def values(self, name: str) -> Sequence[float]:
        """A metric's values in the order in which they came; none if it was never recorded."""
        return self._columns[name][1] if name in self._columns else array("d")

    def points(self) -> Iterator[tuple[str, int, float]]:
        """Every name, iteration and value; those of one metric in their order."""
        for name, (spans, its) in self._columns.items():
            for iteration, value in zip(chain(*spans), its, strict=True):
                yield name, iteration, value

    def table(self) -> pd.DataFrame:
        """A row an iteration, a column a metric; empty where it has no value."""
        columns = {name: pd.Series(its, list(chain(*spans)))
                   for name, (spans, its) in self._columns.items()}  # fmt: skip
        return pd.DataFrame(columns).sort_index()

    def state_dict(self) -> dict[str, Any]:
        """Iterations and values as tensors, by name; `load_state_dict` is the inverse."""
        alike = {
            tuple(spans): torch.cat([torch.arange(each.start, each.stop) for each in spans])
            for spans, _ in self._columns.values()
        }  # of metrics that were recorded together one tensor, which is stored once
        return {name: (alike[tuple(spans)], torch.from_numpy(np.array(its)))
                for name, (spans, its) in self._columns.items()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._columns = {}
        for name, (at, its) in state.items():
            for iteration, value in zip(at.tolist(), its.tolist(), strict=True):
                self.add({name: value}, iteration)
