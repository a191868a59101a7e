"""T inner problems of linear heads, each with its objective written out for autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import solve
from torch import Size, Tensor
from torch.func import grad, hessian

from l2l_implicit.inner_problem.linear_heads import GOALS, HeadProblem, LinearHeads
from l2l_implicit.inner_problem.linearization import SquaredDistance
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError

M, WIDTH, CLASSES = 7, 4, 3
KINDS: list[type[OutputLoss]] = [CrossEntropy, SquaredError]
each = pytest.mark.parametrize("tasks, kind", [(t, kind) for t in (1, 3) for kind in KINDS])
TORCH: dict[type[OutputLoss], Callable[..., Tensor]] = {
    CrossEntropy: lambda z, y: F.cross_entropy(z, y, reduction="sum"),  # of probabilities
    SquaredError: lambda z, y: F.mse_loss(z, y, reduction="sum"),
}


class Case(NamedTuple):
    """T inner problems, and each one's objective as a pure function of phi, x, anchor and l2."""

    heads: LinearHeads
    anchor: Tensor
    l2: Tensor

    def objective(self, t: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        problem = self.heads.problem
        k, d = problem.weight

        def g(phi: Tensor, x: Tensor, anchor: Tensor, l2: Tensor) -> Tensor:
            outputs = x @ phi[: k * d].view(k, d).t()
            outputs = outputs + phi[k * d :] if problem.bias else outputs
            loss = TORCH[type(problem.loss)](outputs, problem.loss.targets[t])
            return problem.loss.scale * loss + 0.5 * l2 * (phi - anchor).square().sum()

        return g

    def arguments(self, t: int) -> tuple[Tensor, ...]:
        return self.heads.point[t], self.heads.problem.x[t], self.anchor.detach(), self.l2.detach()

    def at(self, heads: LinearHeads) -> Case:
        return self._replace(heads=heads)

    def per_task(self, what: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([what(t) for t in range(len(self.heads.point))])

    def gradients(self) -> Tensor:
        return self.per_task(lambda t: grad(self.objective(t))(*self.arguments(t)))

    def hessians(self) -> Tensor:
        return self.per_task(lambda t: hessian(self.objective(t))(*self.arguments(t)))


def targets_of(kind: type[OutputLoss], tasks: int, m: int = M) -> Tensor:
    if kind is SquaredError:
        return torch.randn(tasks, m, CLASSES)
    return F.one_hot(torch.randint(CLASSES, (tasks, m)), CLASSES).double()


def case(
    kind: type[OutputLoss], tasks: int, *, bias: bool = True, anchored: bool = True,
    l2: float = 0.2, x: Tensor | None = None, scale: float = 1 / M, goal: float | None = None,
) -> Case:  # fmt: skip
    x = torch.randn(tasks, M, WIDTH) if x is None else x
    weight = Size((CLASSES, x.shape[2]))
    n = weight.numel() + CLASSES * bias
    pieces = [torch.randn(weight), torch.randn(CLASSES)][: 1 + bias]
    anchor = [piece.requires_grad_() for piece in pieces] if anchored else []
    strength = torch.tensor(l2).requires_grad_()
    targets = targets_of(kind, tasks, x.shape[1])
    problem = HeadProblem(
        x, x.clone().requires_grad_(), kind(targets, targets, scale),
        SquaredDistance(strength, anchor, torch.float64), weight, bias,
        GOALS[torch.float64] if goal is None else goal,
    )  # fmt: skip
    flat = torch.cat([a.reshape(-1) for a in anchor]) if anchor else torch.zeros(n)
    return Case(LinearHeads(problem, torch.randn(tasks, n)), flat, strength)


def dense_minimum(found: Case) -> Tensor:
    def minimum(t: int) -> Tensor:
        _, *rest = found.arguments(t)
        return solve(lambda phi: found.objective(t)(phi, *rest), rest[1])

    return found.per_task(minimum)
