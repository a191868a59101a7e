"""The truncated Neumann series, a linear solver without inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NON_FINITE,
    ZERO,
    LinearSolution,
    Matvec,
)


@dataclass(frozen=True)
class Neumann:
    r"""The series :math:`v = \alpha \sum_{j=0}^{N-1} (I - \alpha A)^j b` for :math:`A v = b`.

    The summand :math:`r_j = (I - \alpha A)^j b` is also the residual of the sum before it, so the
    residual that is returned is the true one, and the sum that is returned that of the smallest.
    The series converges for a positive definite :math:`A` and :math:`\alpha < 2 / L` with its
    largest eigenvalue L, at the rate of gradient descent: it needs about the square of conjugate
    gradient's steps. A system whose residual grew beyond the start's says so (`DIVERGED`).

    Args:
        steps: the number N of terms.
        tol: stop once ``norm(b - A v) <= tol * norm(b)``.
        step_size: :math:`\alpha`; None: 1 / L with each task's L estimated (a few products more).
        damping: added to the diagonal of the system in the backward pass.

    References:
        Lorraine, Vicol, Duvenaud (2020), Algorithm 3.

    Example:
        >>> import torch
        >>> from l2l_implicit import Neumann
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> answer = Neumann(50, 1e-6).solve(lambda p: p @ A, torch.tensor([[1.0, 2.0]]))
        >>> answer.solution
        tensor([[0.0909, 0.6364]])
        >>> answer.reason
        ['converged']
    """

    steps: int = 20
    tol: float = 1e-4
    step_size: float | None = None
    damping: float = 0.0

    takes_factor = False

    def __post_init__(self) -> None:
        checks.count("Neumann: steps (N)", self.steps)
        checks.positive("Neumann: tol", self.tol)
        checks.not_negative("Neumann: damping", self.damping)
        if self.step_size is not None:
            checks.positive("Neumann: step_size", self.step_size)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The sums of the smallest residuals, ``[T, n]``, for right-hand sides ``b``."""
        b_norm = _norm(b)
        broken, zero = ~b_norm.isfinite(), b_norm == 0
        r = torch.where(broken.unsqueeze(1), 0.0, b)
        v = torch.zeros_like(b)
        if start is not None:
            residual = r - hvp(start)
            better = (_norm(residual) <= b_norm).unsqueeze(1)  # False for one that is not finite
            v, r = torch.where(better, start, v), torch.where(better, residual, r)
        alpha, lost = self._step_sizes(hvp, b)
        return self._sum(hvp, v, r, alpha, b_norm, broken | lost, zero)

    def _step_sizes(self, hvp: Matvec, b: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha of each task, ``[T]``, and whether its matrix is not finite."""
        if self.step_size is not None:
            return torch.full_like(b[:, 0], self.step_size), torch.zeros_like(b[:, 0]).bool()
        largest = largest_curvature(hvp, b)
        usable = (largest > 0.0) & largest.isfinite()
        return torch.where(usable, 1.0 / largest, 0.0), ~largest.isfinite()

    def _sum(
        self, hvp: Matvec, v: Tensor, r: Tensor, alpha: Tensor, b_norm: Tensor, broken: Tensor,
        zero: Tensor,
    ) -> LinearSolution:  # fmt: skip
        """The terms from the residual ``r`` of ``v`` on."""
        norm = first = smallest = _norm(r)
        best, diverged = v, (alpha == 0.0) & ~broken
        steps = torch.zeros_like(zero, dtype=torch.long)
        active = ~(broken | zero | diverged)
        for _ in range(self.steps):
            active = active & (norm > self.tol * b_norm)
            if not bool(active.any()):
                break
            share = torch.where(active, alpha, 0.0).unsqueeze(1)
            product = torch.where(active.unsqueeze(1), hvp(r), 0.0)
            v, r, steps = v + share * r, r - share * product, steps + active
            norm = torch.where(active, _norm(r), norm)
            broken = broken | (active & ~norm.isfinite() & (steps == 1))
            diverged = torch.where(active, ~(norm <= first), diverged)
            active = active & norm.isfinite()
            better = norm < smallest
            best = torch.where(better.unsqueeze(1), v, best)
            smallest = torch.where(better, norm, smallest)
        solved = smallest <= self.tol * b_norm
        relative = torch.where(b_norm > 0, smallest / b_norm, 0.0)
        best = torch.where(broken.unsqueeze(1), 0.0, best)
        relative = torch.where(broken, math.inf, relative)
        flags = zip(broken.tolist(), zero.tolist(), solved.tolist(), diverged.tolist(), strict=True)
        return LinearSolution(best, steps, relative, [_reason(*f) for f in flags])


def _reason(broken: bool, zero: bool, solved: bool, diverged: bool) -> str:
    if broken:
        return NON_FINITE
    if zero:
        return ZERO
    if solved:
        return CONVERGED
    return DIVERGED if diverged else MAX_STEPS


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)
