"""Linear heads that are hard: right, or warned of, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import Problem, Settings, loss_of, query_loss, right_features
from oracles import implicit_from, linear
from small_task import adapt
from solver_settings import WAYS, clustered
from torch import Tensor, nn
from verdict import Heard, judge, must_be_right, off

from l2l_implicit import LBFGS, ImplicitCGHead

D = torch.float64
LOSSES = {"cross-entropy": (False, "mean"), "sum of cross-entropies": (False, "sum"),
          "squared error": (True, "mean"), "sum of squares": (True, "sum")}  # fmt: skip


def problem(
    x: Tensor, query: Tensor, ways: int, l2: float, loss: str = "cross-entropy", bias: bool = True
) -> Problem:
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
    task: Problem, how: str, steps: int, dtype: torch.dtype = torch.float32, **settings: Any
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


@pytest.mark.parametrize("way, ways, shots", [
    *((way, 5, 4) for way in WAYS), ("default", 2, 1), ("default", 20, 1), ("default", 3, 20),
])  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_large_features_by_every_solver(way: str, ways: int, shots: int, loss: str) -> None:
    support, queries = clustered(ways, shots, 24)
    for size in (4.0, 60.0, 300.0):
        task = problem(size * support, size * queries, ways, 0.05, loss=loss)
        right = right_features(task)
        for how, steps in (("closure", 30), ("losses", 5), ("losses", 1)):
            judge(on_features(task, how, steps, **WAYS[way]), right)
        judge(on_features(task, "closure", 30, D, **WAYS[way]), right)
    if way == "default":
        small = problem(0.1 * support, 0.1 * queries, ways, 0.1, loss=loss)
        must_be_right(on_features(small, "closure", 20), right_features(small))


WITHOUT_CLOSED_FORM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "weighted": lambda out, y: F.cross_entropy(
        out, y, weight=torch.tensor([1.0, 9.0, 0.1]).to(out)),
    "one against all": lambda out, y: F.binary_cross_entropy_with_logits(
        out, F.one_hot(y, 3).to(out)),
    "focal": lambda out, y: ((1 - F.softmax(out, 1)[torch.arange(len(y)), y]).square()
                             * F.cross_entropy(out, y, reduction="none")).mean(),
    "scaled": lambda out, y: F.cross_entropy(out * 1.0, y) * 3.0,
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_large_features_without_a_closed_form(name: str) -> None:
    loss = WITHOUT_CLOSED_FORM[name]
    y = torch.arange(12) % 3
    for size in (0.3, 30.0):
        support, queries = (size * part.double() for part in clustered(3, 4, 6))

        def gradient(**settings: Any) -> Callable[[], Tensor]:
            def call() -> Tensor:
                x = support.clone().requires_grad_()  # noqa: B023
                learner = ImplicitCGHead(nn.Linear(6, 3).double(), 0.1, l2=0.1, **settings).clone()
                learner.adapt(lambda: loss(learner(x), y), steps=30)
                F.cross_entropy(learner(queries), y).backward()  # noqa: B023
                return x.grad

            return call

        right = implicit_from(
            lambda p, x: loss(linear(p, x.view(12, 6), 3), y) + 0.05 * p.square().sum(),
            lambda p, x: F.cross_entropy(linear(p, queries, 3), y),  # noqa: B023
            torch.zeros(21, dtype=D), support.reshape(-1),
        ).view(12, 6)  # fmt: skip
        for settings in ({}, {"inner": LBFGS()}):
            judge(gradient(**settings), right)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("way", ["default", "LBFGS", "adaptive descent", "direct", "Neumann"])
def test_ridge_with_constant_features(way: str, dtype: torch.dtype) -> None:
    for ways, shots, width in ((3, 5, 6), (2, 10, 40), (10, 2, 12)):
        for constant in (30.0, 255.0, 1e4):
            support, queries = clustered(ways, shots, width)
            for part in (support, queries):
                part[:, 0], part[:, 3] = constant, -constant / 7
            for loss in ("squared error", "sum of squares"):
                task = problem(support, queries, ways, 0.1, loss=loss, bias=width == 12)
                right = right_features(task)
                judge(on_features(task, "closure", 100, dtype, **WAYS[way]), right)
                judge(on_features(task, "losses", 5, dtype, **WAYS[way]), right)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("constant", [1e5, 2e7, 1e8, 1e12])
def test_one_huge_constant_feature(loss: str, constant: float) -> None:
    """More than float64's digits between two features: no number is sure, but none is silent."""
    for size, shots, width in ((1.0, 12, 30), (1000.0, 12, 30), (1000.0, 2, 60)):
        support, queries = (size * part for part in clustered(5, shots, width))
        support[:, 0] = queries[:, 0] = constant
        task = problem(support, queries, 5, 0.5, loss=loss, bias=False)
        for dtype in (torch.float32, D):
            for how, steps in (("closure", 20), ("losses", 1)):
                judge(on_features(task, how, steps, dtype), lambda task=task: right_features(task))


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("constant", [1.0, 255.0, 1e5])
def test_ridge_on_scales_of_the_features(constant: float, dtype: torch.dtype) -> None:
    """Theta is one scale a feature, in support and query, and the loss has no closed form."""
    support, queries = (part.double() for part in clustered(3, 5, 6))
    support[:, 0] = queries[:, 0] = constant
    y, yq = (F.one_hot((torch.arange(15) + i) % 3, 3).to(D) for i in (0, 1))

    def gradient() -> Tensor:
        scale = torch.ones(6, dtype=dtype, requires_grad=True)
        learner = ImplicitCGHead(nn.Linear(6, 3).to(dtype), lr=0.1, l2=0.1).clone()
        x, q = support.to(dtype), queries.to(dtype)
        learner.adapt(lambda: (learner(x * scale) - y.to(dtype)).square().mean(), steps=100)
        F.mse_loss(learner(q * scale), yq.to(dtype)).backward()
        return scale.grad

    right = implicit_from(
        lambda p, s: F.mse_loss(linear(p, support * s, 3), y) + 0.05 * p.square().sum(),
        lambda p, s: F.mse_loss(linear(p, queries * s, 3), yq),
        torch.zeros(21, dtype=D), torch.ones(6, dtype=D),
    )  # fmt: skip
    (must_be_right if constant == 1.0 else judge)(gradient, right)


@pytest.mark.parametrize("l2", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("loss", LOSSES)
def test_small_l2(l2: float, loss: str) -> None:
    for ways, shots, width in ((5, 5, 64), (2, 3, 16), (8, 1, 20)):
        support, queries = clustered(ways, shots, width)
        task = problem(support, queries, ways, l2, loss=loss)
        right = right_features(task)
        for way in ("default", "LBFGS", "gradient descent"):
            judge(on_features(task, "losses", 5, **WAYS[way]), right)
            judge(on_features(task, "closure", 20, D, **WAYS[way]), right)


@pytest.mark.parametrize("way", ["default", "LBFGS", "gradient descent", "adaptive descent"])
def test_a_head_counts_every_task_that_five_losses_leave_unsolved(way: str) -> None:
    """As in learn2learn's scripts: one head, a clone a task, rectified features of any size."""
    head = ImplicitCGHead(nn.Linear(64, 5), lr=0.1, **WAYS[way])
    wrong, warned = 0, []
    for seed in range(8):
        support, queries = ((1.0 + seed) * part.relu() for part in clustered(5, 5, 64, seed))
        task = problem(support, queries, 5, 0.1)
        x, learner = task.x.float().requires_grad_(), head.clone()

        def run(learner=learner, x=x, task=task) -> None:  # type: ignore[no-untyped-def]
            for _ in range(5):
                learner.adapt(F.cross_entropy(learner(x), task.y))
            F.cross_entropy(learner(task.query.float()), task.query_y).backward()

        heard = Heard(run)
        assert heard.error is None
        warned += heard.warned
        wrong += off(x.grad, right_features(task)) > 0.02
    assert head.diagnostics.hypergradients == 8
    assert head.diagnostics.unsolved >= wrong
    assert bool(warned) >= bool(wrong)
    if way == "default":
        assert not wrong and not warned
