"""The same data for a linear head and a network, as modules and as functions of one vector."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracles import flat, linear, network
from small_task import adapt
from torch import Tensor, nn

D = torch.float64
LR = 0.1
torch.manual_seed(0)
X, QUERY, Y = torch.randn(12, 5, dtype=D), torch.randn(12, 5, dtype=D), torch.arange(12) % 3
FIRST, LAST = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
NETS: dict[str, nn.Module] = {
    "linear": nn.Linear(5, 3).double(),
    "two layers": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
}


def forward(name: str, phi: Tensor, x: Tensor) -> Tensor:
    return linear(phi, x, 3) if name == "linear" else network(phi, x, 4, 3, torch.tanh)


def start_of(name: str) -> Tensor:
    return flat(NETS[name].parameters())


def outer(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The query loss, for the oracles."""
    return lambda phi, theta: F.cross_entropy(forward(name, phi, QUERY), Y)


def fit(learner: Any, how: str, steps: int = 1) -> None:
    adapt(learner, lambda: F.cross_entropy(learner(X), Y), how, steps)
