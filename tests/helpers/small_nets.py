"""A small task for a linear head and a network, its objective also a function of one vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dense import Function, linear, network
from torch import Tensor, nn
from verdict import flat

from l2l_implicit import ImplicitCGHead

D = torch.float64
LR = 0.1
torch.manual_seed(0)
X, QUERY, Y = torch.randn(12, 5, dtype=D), torch.randn(12, 5, dtype=D), torch.arange(12) % 3
NETS: dict[str, nn.Module] = {
    "linear": nn.Linear(5, 3).double(),
    "two layers": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
}


def forward(name: str, phi: Tensor, x: Tensor) -> Tensor:
    return linear(phi, x, 3) if name == "linear" else network(phi, x, 4, 3, torch.tanh)


def start_of(name: str) -> Tensor:
    return flat(NETS[name].parameters())


def objective(name: str, phi: Tensor, l2: Tensor | float, anchor: Tensor | float = 0.0) -> Tensor:
    loss = F.cross_entropy(forward(name, phi, X), Y)
    return loss + l2 / 2 * (phi - anchor).square().sum()


def outer(name: str) -> Function:
    """The query loss, for the oracles."""
    return lambda phi, theta: F.cross_entropy(forward(name, phi, QUERY), Y)


def adapt(learner: ImplicitCGHead, how: str, steps: int = 1) -> None:
    if how == "closure":
        learner.adapt(lambda: F.cross_entropy(learner(X), Y), steps=steps)
    for _ in range(steps if how == "losses" else 0):
        learner.adapt(F.cross_entropy(learner(X), Y))
