"""Theta of the best validation, kept aside while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from experiments.training.meta_learner import MetaLearner


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
