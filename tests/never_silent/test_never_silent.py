"""Linear heads that are hard: right, or warned of, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import Problem, Settings, known, loss_of, query_loss
from oracles import implicit_from, linear
from small_task import adapt
from solver_settings import WAYS, clustered
from torch import Tensor, nn
from verdict import judge, must_be_right

from l2l_implicit import LBFGS, ImplicitCGHead

D = torch.float64
LOSSES = {"cross-entropy": (False, "mean"), "sum of cross-entropies": (False, "sum"),
          "squared error": (True, "mean"), "sum of squares": (True, "sum")}  # fmt: skip
Change = Callable[[Tensor], Tensor]


def problem(x: Tensor, query: Tensor, ways: int, l2: float, loss: str, bias: bool) -> Problem:
    """A task of numbers that float32 has, its labels in turn."""
    squared, reduction = LOSSES[loss]
    shots, width = len(x) // ways, x.shape[1]
    l2 = float(torch.tensor(l2, dtype=torch.float32))
    settings = Settings("own", 0, ways, shots, width, l2, squared, reduction, bias, "zero")
    labels, query_labels = torch.arange(len(x)) % ways, torch.arange(len(query)) % ways
    if squared:
        labels, query_labels = (F.one_hot(part, ways).to(D) for part in (labels, query_labels))
    head = nn.Linear(width, ways, bias).double()  # only its shape counts: the anchor is zero
    for parameter in head.parameters():
        parameter.data.zero_()
    data, queries = x.float().double(), query.float().double()
    return Problem(settings, 0, 1.0, (), data, labels, queries, query_labels, head)


def on_features(
    task: Problem, how: str, steps: int, dtype: torch.dtype, **settings: Any
) -> Callable[[], Tensor]:
    """The gradient in the support features, by ``steps`` loss tensors or by a closure."""
    own = task.settings

    def call() -> Tensor:
        head = nn.Linear(own.width, own.ways, own.bias).to(dtype)
        x = task.x.clone().to(dtype).requires_grad_()
        learner = ImplicitCGHead(head, lr=0.1, l2=own.l2, **settings).clone()
        adapt(learner, lambda: loss_of(own, learner(x), task.y, own.reduction), how, steps)
        query_loss(task, learner(task.query.to(dtype))).backward()
        return x.grad

    return call


def times(size: float) -> Change:
    return lambda x: size * x


def constants(value: float, *others: float, size: float = 1.0) -> Change:
    """The first feature is ``value``; the fourth and so on the others."""

    def change(x: Tensor) -> Tensor:
        x = size * x
        for column, constant in zip((0, 3), (value, *others), strict=False):
            x[:, column] = constant
        return x

    return change


LARGE = [times(size) for size in (4.0, 60.0, 300.0)]
HUGE = product((1e5, 2e7, 1e8, 1e12), (1.0, 1000.0))  # more than float64's digits between two
# What is done to the features; l2; ways, shots and width; with and without a bias; the solvers.
HARD: dict[str, tuple[list[Change], list[float], list[tuple[int, ...]], list[bool], list[str]]] = {
    "large": (LARGE, [0.05], [(5, 4, 24)], [True], [*WAYS]),
    "large, other shapes": (LARGE, [0.05], [(2, 1, 24), (20, 1, 24), (3, 20, 24)], [True],
                            ["default"]),
    "constants": ([constants(c, -c / 7) for c in (30.0, 255.0, 1e4)], [0.1],
                  [(3, 5, 6), (2, 10, 40), (10, 2, 12)], [True, False],
                  ["default", "LBFGS", "adaptive descent", "direct", "Neumann"]),
    "one huge constant": ([constants(c, size=size) for c, size in HUGE], [0.5],
                          [(5, 12, 30), (5, 2, 60)], [False], ["default"]),
    "small l2": ([times(1.0)], [1e-2, 1e-3, 1e-4, 1e-6], [(5, 5, 64), (2, 3, 16), (8, 1, 20)],
                 [True], ["default", "LBFGS", "gradient descent"]),
}  # fmt: skip


@cache
def tasks_of(hard: str, loss: str) -> list[tuple[Problem, Callable[[], Tensor]]]:
    """And the right gradient of each, computed when it is asked for."""
    changes, strengths, shapes, biases, _ = HARD[hard]
    found = []
    for change, l2, (ways, shots, width), bias in product(changes, strengths, shapes, biases):
        support, queries = (change(part) for part in clustered(ways, shots, width))
        task = problem(support, queries, ways, l2, loss, bias)
        found.append((task, cache(lambda task=task: known(task).truth.features)))
    return found


@pytest.mark.parametrize("hard, way", [(name, way) for name in HARD for way in HARD[name][-1]])
@pytest.mark.parametrize("loss", LOSSES)
def test_hard_heads(hard: str, way: str, loss: str) -> None:
    for task, right in tasks_of(hard, loss):
        runs = product((("closure", 50), ("losses", 5), ("losses", 1)), (torch.float32, D))
        for (how, steps), dtype in runs:
            judge(on_features(task, how, steps, dtype, **WAYS[way]), right)


Y = torch.arange(12) % 3
WITHOUT_CLOSED_FORM: dict[str, Callable[[Tensor], Tensor]] = {
    "smoothed": lambda out: F.cross_entropy(out, Y, label_smoothing=0.1),
    "weighted": lambda out: F.cross_entropy(out, Y, weight=torch.tensor([1.0, 9.0, 0.1]).to(out)),
    "one against all": lambda out: F.binary_cross_entropy_with_logits(
        out, F.one_hot(Y, 3).to(out)),
    "focal": lambda out: ((1 - F.softmax(out, 1)[torch.arange(12), Y]).square()
                          * F.cross_entropy(out, Y, reduction="none")).mean(),
    "scaled": lambda out: F.cross_entropy(out * 1.0, Y) * 3.0,
    "squares": lambda out: (out - F.one_hot(Y, 3).to(out)).square().mean(),
}  # fmt: skip
DATA = {"small": times(0.3), "large": times(30.0), "constant": constants(1.0),
        "large constant": constants(255.0), "huge constant": constants(1e5)}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
@pytest.mark.parametrize("data", DATA)
def test_without_a_closed_form(name: str, data: str) -> None:
    """Theta is one scale a feature, in support and query."""
    loss = WITHOUT_CLOSED_FORM[name]
    support, queries = (DATA[data](part.double()) for part in clustered(3, 4, 6))

    def gradient(dtype: torch.dtype, **settings: Any) -> Tensor:
        scale = torch.ones(6, dtype=dtype, requires_grad=True)
        learner = ImplicitCGHead(nn.Linear(6, 3).to(dtype), 0.1, l2=0.1, **settings).clone()
        x, query = support.to(dtype), queries.to(dtype)
        learner.adapt(lambda: loss(learner(x * scale)), steps=60)
        F.cross_entropy(learner(query * scale), Y).backward()
        return scale.grad

    right = implicit_from(
        lambda p, s: loss(linear(p, support * s, 3)) + 0.05 * p.square().sum(),
        lambda p, s: F.cross_entropy(linear(p, queries * s, 3), Y),
        torch.zeros(21, dtype=D), torch.ones(6, dtype=D),
    )  # fmt: skip
    for dtype in (torch.float32, D):
        (must_be_right if data == "constant" else judge)(lambda d=dtype: gradient(d), right)
        judge(lambda d=dtype: gradient(d, inner=LBFGS()), right)
