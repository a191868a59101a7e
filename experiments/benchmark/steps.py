"""One outer step: the floor's, the implicit head's, its peers'. It leaves gradients on theta.

``as published`` means: the backbone is run again at every inner step, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import higher
import torch
from learn2learn.algorithms import MAML
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, linear

from experiments.benchmark.problem import STEP_SIZE, Problem
from experiments.ingredients.algorithm import solvers
from l2l_implicit import ImplicitCGHead
from l2l_implicit.baselines import UnrolledMAML
from l2l_implicit.chunked import Chunked

L2 = 0.1  # of the peers that carry a regulariser of their own

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


def apart(
    problem: Problem, parent: Any, adapt: Adapt, backbone: nn.Module | None = None
) -> Step:
    """The same with support and query through the backbone one after the other.

    Each then has batch statistics of its own, as in the methods that run the backbone again.
    """
    extract = backbone or problem.backbone
    (images, labels), (query, query_labels) = problem.support, problem.query

    def step() -> None:
        learner = parent.clone()
        adapt(learner, extract(images), labels)
        cross_entropy(learner(extract(query)), query_labels).backward()

    return step


def whole(problem: Problem, parent: Any, adapt: Adapt) -> Step:
    """An outer step of a learner that adapts the whole network."""
    return apart(problem, parent, adapt, nn.Identity())


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


# The peers


def anil(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML on the head, features computed once."""
    return cached(problem, MAML(problem.new_head(), STEP_SIZE), loss_tensors(steps))


def itd_bio(problem: Problem, steps: int) -> Step:
    """Iterative differentiation of the head from a constant start, features computed once."""
    head = UnrolledMAML(problem.new_head(), STEP_SIZE, learn_init=False)
    return cached(problem, head, closure(steps))


def higher_head(problem: Problem, steps: int) -> Step:
    """`higher` on the head, features computed once."""
    head = problem.new_head()
    optimizer = torch.optim.SGD(head.parameters(), STEP_SIZE)

    def step() -> None:
        features = problem.backbone(problem.images)
        support, query = features[: problem.split], features[problem.split :]
        with higher.innerloop_ctx(head, optimizer, copy_initial_weights=False) as (learner, inner):
            for _ in range(steps):
                inner.step(cross_entropy(learner(support), problem.support[1]))
            cross_entropy(learner(query), problem.query[1]).backward()

    return step


def anil_as_published(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML on the head, the backbone run again at every inner step."""
    head = MAML(problem.new_head(), STEP_SIZE)
    images, labels = problem.support
    query, query_labels = problem.query

    def step() -> None:
        learner = head.clone()
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(problem.backbone(images)), labels))
        cross_entropy(learner(problem.backbone(query)), query_labels).backward()

    return step


def itd_bio_as_published(problem: Problem, steps: int) -> Step:
    """Ji et al. (2020): unrolled gradient steps of a regularised head from a constant start."""
    initial = [p.detach() for p in problem.new_head().parameters()]
    query, query_labels = problem.query

    def step() -> None:
        phi = [p.clone().requires_grad_() for p in initial]
        for _ in range(steps):
            gradients = grad(_inner_objective(problem, phi), phi, create_graph=True)
            phi = [p - STEP_SIZE * g for p, g in zip(phi, gradients, strict=True)]
        cross_entropy(linear(problem.backbone(query), *phi), query_labels).backward()

    return step


def maml(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML, whole network."""
    return whole(problem, MAML(problem.whole(), 0.01), loss_tensors(steps))


def released(problem: Problem, steps: int, cg_steps: int, everything: bool) -> Step:
    """The released step of Yang et al., rebuilt from the paper (Algorithm 1, Subroutine 1).

    The backbone is run again at every inner step, without history; then conjugate gradient, each
    product a double backward pass of the inner gradient's graph.

    Args:
        everything: the double backward passes go through the backbone too (as a call of
            ``backward()`` makes them); else they are asked for the head's parameters alone.
    """
    initial = [p.detach() for p in problem.new_head().parameters()]
    theta = list(problem.backbone.parameters())
    query, query_labels = problem.query

    def step() -> None:
        phi = [p.clone().requires_grad_() for p in initial]
        for _ in range(steps):
            gradients = grad(_inner_objective(problem, phi), phi)
            new = [p - STEP_SIZE * g for p, g in zip(phi, gradients, strict=True)]
            phi = [p.detach().requires_grad_() for p in new]
        inner = grad(_inner_objective(problem, phi), phi, create_graph=True)
        outer = cross_entropy(linear(problem.backbone(query), *phi), query_labels)
        direct = grad(outer, [*theta, *phi])
        b = [g.detach() for g in direct[len(theta) :]]
        v = _conjugate_gradient(inner, [*phi, *theta] if everything else phi, b, cg_steps)
        mixed = grad(inner, theta, v)
        for parameter, first, second in zip(theta, direct, mixed, strict=False):
            parameter.grad = first - second

    return step


def _inner_objective(problem: Problem, phi: Sequence[Tensor]) -> Tensor:
    images, labels = problem.support
    squares = sum((p.square().sum() for p in phi), torch.zeros((), device=images.device))
    return cross_entropy(linear(problem.backbone(images), *phi), labels) + 0.5 * L2 * squares


def _conjugate_gradient(
    gradient: Sequence[Tensor], inputs: Sequence[Tensor], b: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Subroutine 1: ``steps`` steps of CG for H v = b from v = 0, on lists of tensors."""
    v = [torch.zeros_like(x) for x in b]
    r, p = list(b), list(b)
    rr = _dot(r, r)
    for _ in range(steps):
        h = grad(gradient, inputs, p, retain_graph=True)[: len(b)]
        eta = rr / _dot(p, h)
        v = [x + eta * y for x, y in zip(v, p, strict=True)]
        r = [x - eta * y for x, y in zip(r, h, strict=True)]
        rr, before = _dot(r, r), rr
        p = [x + rr / before * y for x, y in zip(r, p, strict=True)]
    return v


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
