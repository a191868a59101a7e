"""One outer step: the floor, and the implicit head's. A step leaves gradients on theta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmark.problem import STEP_SIZE, Problem
from experiments.ingredients.algorithm import solvers
from l2l_implicit import ImplicitCGHead
from l2l_implicit.chunked import Chunked

Step = Callable[[], None]
Adapt = Callable[[Any, Tensor, Tensor], None]
"""Adapts a clone to support features and labels."""


def supervised(problem: Problem) -> Step:
    """The floor: forward and backward over all images of the task."""
    head = problem.new_head()

    def step() -> None:
        cross_entropy(head(problem.backbone(problem.images)), problem.labels).backward()

    return step


def closure(steps: int) -> Adapt:
    """``adapt(closure, steps=K)``."""

    def adapt(learner: Any, features: Tensor, labels: Tensor) -> None:
        learner.adapt(lambda: cross_entropy(learner(features), labels), steps=steps)

    return adapt


def loss_tensors(steps: int) -> Adapt:
    """learn2learn's loop: ``adapt(loss)`` K times."""

    def adapt(learner: Any, features: Tensor, labels: Tensor) -> None:
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(features), labels))

    return adapt


def cached(
    problem: Problem, head: Any, adapt: Adapt, backbone: nn.Module | None = None
) -> Step:
    """An outer step on features that are computed once, support and query together."""
    extract = backbone or problem.backbone
    _, support_labels = problem.support
    _, query_labels = problem.query

    def step() -> None:
        features, learner = extract(problem.images), head.clone()
        adapt(learner, features[: problem.split], support_labels)
        cross_entropy(learner(features[problem.split :]), query_labels).backward()

    return step


def apart(problem: Problem, head: Any, adapt: Adapt) -> Step:
    """The same with support and query through the backbone one after the other.

    Each then has batch statistics of its own, as in the methods that run the backbone again.
    """
    images, labels = problem.support
    query, query_labels = problem.query

    def step() -> None:
        learner = head.clone()
        adapt(learner, problem.backbone(images), labels)
        cross_entropy(learner(problem.backbone(query)), query_labels).backward()

    return step


def head_of(problem: Problem, step: str, cg_steps: int, **settings: Any) -> ImplicitCGHead:
    """The implicit head; ``step`` and ``settings`` are the command line's."""
    found = solvers(step=step, cg_steps=cg_steps, **settings)
    return ImplicitCGHead(problem.new_head(), STEP_SIZE, **found)


def implicit(problem: Problem, step: str, adapt: Adapt, cg_steps: int, **settings: Any) -> Step:
    """The implicit head's outer step; settings as in `head_of`."""
    return cached(problem, head_of(problem, step, cg_steps, **settings), adapt)


def chunked(problem: Problem, head: Any, adapt: Adapt, size: int) -> Step:
    """The same as `cached` with the backbone run in chunks of ``size`` images."""
    return cached(problem, head, adapt, Chunked(problem.backbone, size))
