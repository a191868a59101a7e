"""Heads and features of other kinds, each against the implicit function theorem."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import (
    Problem,
    Theta,
    adapt,
    cross_entropy,
    error_where_it_ended,
    hypergradient,
    leaf,
    linear,
    make_learner,
    query_cross_entropy,
    raw,
)
from small_task import HOWS
from torch import Tensor, nn

from l2l_implicit.tasks import get_tasksets

pytestmark = pytest.mark.usefixtures("float64")
WORDS = 30


class WrittenOut(nn.Module):
    """A normalisation by its formula: torch.func's second derivatives of torch's are off by 1 %."""

    def __init__(self, norm: nn.BatchNorm1d | nn.LayerNorm) -> None:
        super().__init__()
        self.dim, self.eps = 0 if isinstance(norm, nn.BatchNorm1d) else 1, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(self.dim, keepdim=True)
        variance = centered.square().mean(self.dim, keepdim=True)
        return centered / (variance + self.eps).sqrt() * self.weight + self.bias


def sine() -> Problem:
    """Ten support and ten query points of one sinusoid, as the tasks of this name give them."""
    x, y = (part.double() for part in get_tasksets("sine", train_samples=20).train.sample())

    def embed(theta: Theta) -> tuple[Tensor, Tensor]:
        h = torch.tanh(torch.tanh(x @ theta["first"]) @ theta["second"])
        return h[:10], h[10:]

    theta = {"first": leaf(1, 12), "second": leaf(12, 6)}
    return Problem("sine", linear(1, width=6), theta, embed,
                   lambda net, t, h: F.mse_loss(net(h[0]), y[:10]),
                   lambda net, t, h: F.mse_loss(net(h[1]), y[10:]))  # fmt: skip


def text() -> Problem:
    """Documents as lists of word numbers: the mean of their words' vectors, a linear head."""
    words = torch.randint(WORDS, (12, 7)), torch.randint(WORDS, (9, 7))

    def embed(theta: Theta) -> tuple[Tensor, Tensor]:
        support, query = (F.embedding(part, theta["words"]).mean(1) for part in words)
        return support, query

    return Problem("text", linear(3, width=5), {"words": leaf(WORDS, 5)}, embed,
                   cross_entropy("mean"), query_cross_entropy, anchor="init", l2=1.0)  # fmt: skip


def tabular(*between: nn.Module) -> Problem:
    """Given columns; of the features only their scales are learned."""
    head = nn.Sequential(linear(6), *between, nn.Tanh(), linear(3, width=6)).double()

    def embed(theta: Theta) -> tuple[Tensor, Tensor]:
        support, query = raw(theta)
        return support * theta["factors"], query * theta["factors"]

    factors = (1 + 0.1 * torch.randn(4)).requires_grad_()
    return Problem("tabular", head, {"factors": factors}, embed, cross_entropy("mean"),
                   query_cross_entropy, anchor="init", l2=1.0, lr=0.1)  # fmt: skip


CASES: dict[str, Callable[[], Problem]] = {
    "sine": sine,
    "text": text,
    "multi-layer": tabular,
    "layer norm": lambda: tabular(nn.LayerNorm(6)),
    "batch norm": lambda: tabular(nn.BatchNorm1d(6)),
    "batch norm in eval mode": lambda: tabular(nn.BatchNorm1d(6).eval()),
    "convolution": lambda: tabular(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.AvgPool1d(2), nn.Flatten()),
}  # fmt: skip


@HOWS
@pytest.mark.parametrize("name", CASES)
def test_hypergradient(name: str, how: str) -> None:
    task = CASES[name]()
    parent = make_learner(task)
    learner, loss = adapt(parent, task, how)
    got = [g.clone() for g in hypergradient(task, loss)]
    oracle = copy.deepcopy(task.head)
    for child, module in oracle.named_children():
        if module.training and isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            setattr(oracle, child, WrittenOut(module))
    task.head = oracle
    assert error_where_it_ended(task, learner, got) < 1e-8
    assert parent.diagnostics.unsolved == 0
