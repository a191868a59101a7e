"""The validations and tests of one run, and which of them counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from experiments.training.early_stopping import BestTheta
from experiments.training.meta_learner import Diverged, Interval, MetaLearner


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
