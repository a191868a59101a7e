"""`experiments.train` as a process in which something happens at a given outer iteration.

`HAPPENS` in its environment says what, as JSON; a test need not guess how long an iteration takes:

    {"signal": [12, 9]}             the process gets signal 9 as the 12th step begins
    {"checkpoint": 8}               the only checkpoint before the end is that after the 8th
    {"validations": [0.2, 0.5]}     scores by which early stopping chooses, an iteration each
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__))


def environment(**happens: Any) -> dict[str, str]:
    """The variables that make it happen."""
    return {"HAPPENS": json.dumps(happens)}


def signal_at(step: int, signum: int) -> None:
    from experiments.training.meta_learner import MetaLearner

    whole, begun = MetaLearner.step, []

    def signalled(self: MetaLearner, *arguments: Any) -> Any:
        begun.append(None)
        if len(begun) == step:
            os.kill(os.getpid(), signum)
        return whole(self, *arguments)

    MetaLearner.step = signalled  # type: ignore[method-assign]


def checkpoint_at(step: int) -> None:
    from experiments.training.loop import Training

    def save_if_due(self: Training) -> None:
        if self.steps == step:
            self._save()

    Training._save_if_due = save_if_due  # type: ignore[method-assign]


def validations_are(scores: list[float]) -> None:
    from experiments.training.scores import BestTheta

    offer = BestTheta.offer

    def offered(self: BestTheta, iteration: int, seconds: float, score: float) -> None:
        offer(self, iteration, seconds, scores[iteration - 1])

    BestTheta.offer = offered  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    happens = json.loads(os.environ["HAPPENS"])
    if "signal" in happens:
        signal_at(*happens["signal"])
    if "checkpoint" in happens:
        checkpoint_at(happens["checkpoint"])
    if "validations" in happens:
        validations_are(happens["validations"])
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
