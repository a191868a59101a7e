"""`early_stopping=True`: theta of the best validation is tested besides, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train_process
from torch import nn

from experiments.training.meta_learner import MEASURES
from experiments.training.scores import BestTheta


class Learner:
    """Theta is one number, with a buffer beside it."""

    def __init__(self, kind: str) -> None:
        self.measure = MEASURES[kind]
        self.network = nn.BatchNorm1d(1)

    def theta_state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict()}

    def load_theta_state(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])

    def set(self, value: float) -> None:
        for tensor in (self.network.weight.data, self.network.running_mean):
            assert tensor is not None
            tensor.fill_(value)

    @property
    def values(self) -> tuple[float, float]:
        mean = self.network.running_mean
        assert mean is not None
        return self.network.weight.item(), mean.item()


@pytest.mark.parametrize(
    ("kind", "scores", "at"),
    [("classification", [0.3, 0.7, 0.7, 0.2], 2), ("regression", [3.0, 0.7, 0.7, 2.0], 2),
     ("classification", [0.0], 1), ("regression", [float("inf"), 2.0], 2)],
)  # fmt: skip
def test_the_first_of_the_best_is_kept(kind: str, scores: list[float], at: int) -> None:
    learner = Learner(kind)
    best = BestTheta(learner)  # type: ignore[arg-type]
    for iteration, score in enumerate(scores, 1):
        learner.set(iteration)
        best.offer(iteration, 10.0 * iteration, score)
    assert (best.iteration, best.seconds) == (at, 10.0 * at)
    learner.set(99.0)
    with best.in_place():
        assert learner.values == (at, at)
    assert learner.values == (99.0, 99.0)
    with pytest.raises(KeyboardInterrupt), best.in_place():
        raise KeyboardInterrupt
    assert learner.values == (99.0, 99.0)


def test_its_state_goes_through_a_file(tmp_path: Path) -> None:
    learner = Learner("classification")
    best, other = BestTheta(learner), BestTheta(learner)  # type: ignore[arg-type]
    learner.set(4.0)
    best.offer(7, 1.5, 0.6)
    torch.save(best.state_dict(), tmp_path / "state.pt")
    learner.set(5.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.offer(8, 2.0, 0.5)
    with other.in_place():
        assert learner.values == (4.0, 4.0)
    assert (other.iteration, other.seconds) == (7, 1.5)


VALIDATIONS = [0.3, 0.2, 0.5, 0.5, 0.4]  # the third is the first of the best


def run(folder: Path, *settings: str) -> SimpleNamespace:
    """A short run, early stopped by scores that are given and not hoped for; what it printed."""
    command = [sys.executable, train_process.SCRIPT, "-u", "with", "smoke", "threads=1"]
    happens = train_process.environment(validations=VALIDATIONS)
    shown = subprocess.run(
        [*command, f"output={folder}", *settings], capture_output=True, text=True,
        env={**os.environ, **happens},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    (found,) = folder.glob("unobserved-*")
    return SimpleNamespace(text=shown.stdout, folder=found)


def test_it_is_what_a_run_that_ends_there_has(tmp_path: Path) -> None:
    """Equal to the last digit, and in every parameter, to a run of so many iterations."""
    common = ("validate_every=1", "validation_tasks=4", "test_tasks=10")
    whole = run(tmp_path / "whole", *common, "iterations=5", "early_stopping=True")
    kept = torch.load(whole.folder / "early_stopped_parameters.pt", weights_only=True)
    at = kept["iteration"]
    assert at == 3 and f"of outer iteration {at}, the best validation" in whole.text
    short = run(tmp_path / "short", *common, f"iterations={at}")
    score = whole.text.partition("early stopped ")[2].split()[:4]
    assert score == short.text.partition("test accuracy ")[2].split()[:4]
    ended, other = (torch.load(run.folder / "parameters.pt", weights_only=True)
                    for run in (short, whole))  # fmt: skip
    assert equal(kept, ended) and not equal(kept, other)
    assert "early stopped" not in short.text
    assert not (short.folder / "early_stopped_parameters.pt").exists()


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """In all that is trained; the test moves running means, which nothing reads."""
    def trained(state: dict[str, Any]) -> list[torch.Tensor]:
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        named = (item for part in ("backbone", "head") for item in state[part].items())
        return [*state["theta"], *(v for name, v in named if not name.endswith(buffers))]

    return all(torch.equal(*pair) for pair in zip(trained(one), trained(other), strict=True))
