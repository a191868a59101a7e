"""What the tests of the baselines do with a learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from baseline_oracles import LABELS, QUERY_LABELS, Case
from torch import Tensor


def support_loss(learner: Any, case: Case, cached: bool = True) -> Callable[[], Tensor]:
    """The inner loss as a closure, on features computed once or at each call."""
    h = case.embed(case.theta, case.support) if cached else None

    def loss() -> Tensor:
        x = case.embed(case.theta, case.support) if h is None else h
        return F.cross_entropy(learner(x), LABELS)

    return loss


def query_loss(learner: Any, case: Case) -> Tensor:
    return F.cross_entropy(learner(case.embed(case.theta, case.query)), QUERY_LABELS)


def outer_step(parent: Any, case: Case, steps: int, cached: bool = True) -> Any:
    """Adapt a clone by a closure and back-propagate the query loss; the clone."""
    learner = parent.clone()
    learner.adapt(support_loss(learner, case, cached), steps=steps)
    query_loss(learner, case).backward()
    return learner


def gradients(case: Case, *more: Tensor) -> list[Tensor]:
    """What the backward pass left on the initial value, theta and ``more``; zeros for nothing."""
    leaves = [*case.module.parameters(), *case.theta, *more]
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
