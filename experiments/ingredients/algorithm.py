"""The inner learner: one object behind learn2learn's ``clone`` and ``adapt``."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import learn2learn as l2l
import torch
from torch import Tensor, nn

from experiments.tracking import TrackedIngredient, UserError
from experiments.tracking.errors import nearest
from l2l_implicit import Diagnostics, ImplicitCGHead, checks

algorithm = TrackedIngredient("algorithm")
TYPES = {"l2": float, "cg_tol": float, "lr": float}


@algorithm.config
def defaults() -> None:
    name = "rm_metal"  # rm_metal (ImplicitCGHead) or anil (learn2learn's MAML on the head)
    lr = 0.1  # inner step size; step=newton needs it only as a fallback
    steps = 20  # the most inner steps K
    l2 = 0.1  # inner regulariser
    cg_steps = 20  # the most conjugate gradient steps N
    cg_tol = 1e-4  # relative residual at which conjugate gradient stops
    step = "newton"  # newton or gradient


Loss = Callable[[Tensor, Tensor], Tensor]


class ImplicitHead:
    """`ImplicitCGHead` in an outer step."""

    def __init__(self, head: ImplicitCGHead, steps: int, loss: Loss) -> None:
        self.head, self._steps, self._loss = head, steps, loss

    def adapt(self, features: Tensor, labels: Tensor) -> tuple[nn.Module, Diagnostics]:
        """A head adapted to the support set (features ``[m, d]``, labels ``[m]``)."""
        learner = self.head.clone()
        learner.adapt(lambda: self._loss(learner(features), labels), steps=self._steps)
        return learner, learner.diagnostics


class UnrolledHead:
    """learn2learn's MAML on the head: ANIL, with the features computed once a task."""

    def __init__(self, head: l2l.algorithms.MAML, steps: int, loss: Loss) -> None:
        self.head, self._steps, self._loss = head, steps, loss

    def adapt(self, features: Tensor, labels: Tensor) -> tuple[nn.Module, Diagnostics]:
        """As `ImplicitHead.adapt`; where no gradient is wanted, first-order and without history."""
        evaluating = not torch.is_grad_enabled()
        with torch.enable_grad():
            learner = self.head.clone(first_order=evaluating)
            for _ in range(self._steps):
                learner.adapt(self._loss(learner(features), labels))
        return learner, Diagnostics()


@algorithm.capture
def make_algorithm(
    width: int,
    ways: int,
    name: str,
    lr: float,
    steps: int,
    l2: float,
    cg_steps: int,
    cg_tol: float,
    step: str,
) -> Any:
    """The configured algorithm on a linear head of ``width`` features and ``ways`` classes."""
    head, loss = nn.Linear(width, ways), nn.CrossEntropyLoss()
    try:
        checks.count("steps (K)", steps)
        checks.positive("lr", lr)
        if name == "rm_metal":
            learner = ImplicitCGHead(
                head, lr, l2=l2, cg_steps=cg_steps, cg_tol=cg_tol, step=step
            )
            return ImplicitHead(learner, steps, loss)
        if name == "anil":
            return UnrolledHead(l2l.algorithms.MAML(head, lr), steps, loss)
    except (ValueError, TypeError) as error:
        raise UserError(f"algorithm.{error}") from error
    near = nearest(name, ["rm_metal", "anil"])
    raise UserError(f"algorithm.name: expected rm_metal or anil, got {name!r}{near}")
