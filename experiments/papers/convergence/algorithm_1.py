"""Algorithm 1 of Yang et al. (2025) as printed, all tasks of a batch in one learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.ingredients.algorithm import solvers
from experiments.papers.convergence.problem import Tasks
from l2l_implicit import ImplicitCGHead, LinearSolution


class Settings(NamedTuple):
    """K, N, both step sizes, and whether a slot of the batch starts where it was before."""

    inner_steps: int
    cg_steps: int
    inner_lr: float
    meta_lr: float
    warm: bool = True


class Parameters(nn.Module):
    """Phi of every slot of the batch, ``[B, q]``, zero at first."""

    def __init__(self, slots: int, q: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(slots, q, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.phi


class Slots(ImplicitCGHead):
    """Its Hessian is block diagonal: Subroutine 1 runs in every slot with steps of its own."""

    slots: tuple[int, int]

    def linear_solve(
        self, hvp: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None
    ) -> LinearSolution:
        shape = self.slots
        answer = self.linear.solve(
            lambda p: hvp(p.view(1, -1)).view(shape),
            b.view(shape),
            None if start is None else start.view(shape),
        )
        norms = answer.relative_residual * b.view(shape).norm(dim=1)
        relative = norms.norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)
        worst = answer.reason[int(answer.relative_residual.argmax())]
        steps = answer.steps.amax(0, keepdim=True)
        return LinearSolution(answer.solution.view(1, -1), steps, relative.view(1), [worst])


class Algorithm1:
    """Theta and the learner of its batch.

    Args:
        slots: the batch size B.
        p, q: dimensions of theta and phi.
        settings: K, N and the step sizes.
        theta: where to begin.
    """

    def __init__(self, slots: int, q: int, settings: Settings, theta: Tensor) -> None:
        self.settings, self.theta = settings, theta.clone().requires_grad_()
        self._learner: Any = Slots(
            Parameters(slots, q),
            settings.inner_lr,
            l2=0.0,
            warm_start=settings.warm,
            max_error=1e300,  # K_0 and N_0 are there to be undercut
            **solvers(step="gradient", cg_steps=settings.cg_steps, cg_tol=1e-13),
        )
        self._learner.slots = slots, q

    def hypergradient(self, tasks: Tasks) -> Tensor:
        """Eq. (8) at the present theta, ``[p]``."""
        learner = self._learner.clone(task="slots" if self.settings.warm else None)
        pull = tasks.pull(self.theta)  # once a task: theta acts through nothing else
        learner.adapt(lambda: tasks.inner(learner(), pull), steps=self.settings.inner_steps)
        (gradient,) = torch.autograd.grad(tasks.outer(learner()), self.theta)
        return gradient

    @torch.no_grad()
    def step(self, tasks: Tasks) -> None:
        """One outer iteration."""
        with torch.enable_grad():
            gradient = self.hypergradient(tasks)
        self.theta -= self.settings.meta_lr * gradient
