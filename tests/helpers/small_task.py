"""A small task, for tests of what a learner does rather than of numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIX_LABELS = torch.arange(6) % 3


def six_inputs() -> Tensor:
    return torch.randn(6, 4)


def fit(learner: Any, inputs: Tensor, how: str = "loss", steps: int = 8) -> None:
    """Adapt to six examples by loss tensors or by a closure."""

    def loss() -> Tensor:
        return F.cross_entropy(learner(inputs), SIX_LABELS)

    if how == "closure":
        learner.adapt(loss, steps=steps)
    else:
        for _ in range(steps):
            learner.adapt(loss())


def small_nets() -> dict[str, nn.Module]:
    """Heads for `six_inputs`."""
    return {
        "linear": nn.Linear(4, 3),
        "deep": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        "batch norm": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    }
