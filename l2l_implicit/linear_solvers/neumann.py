"""The truncated Neumann series, a linear solver without inner products."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from l2l_implicit import checks
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, RightHandSides, System


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
        >>> answer.solution, answer.reason
        (tensor([[0.0909, 0.6364]]), ['converged'])
    """

    steps: int = 20
    tol: float = 1e-4
    step_size: float | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.count("Neumann: steps (N)", self.steps)
        checks.positive("Neumann: tol", self.tol)
        checks.not_negative("Neumann: damping", self.damping)
        if self.step_size is not None:
            checks.positive("Neumann: step_size", self.step_size)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The sums of the smallest residuals, ``[T, n]``, for right-hand sides ``b``."""
        system, right = System.of(hvp), RightHandSides(b)
        broken, (v, r) = right.lost, right.begin(system, start)
        if self.step_size is None:
            largest = largest_curvature(system, b)
            broken, alpha = broken | ~largest.isfinite(), torch.where(largest > 0, 1 / largest, 0.0)
        else:
            alpha = torch.full_like(right.norm, self.step_size)
        left = first = smallest = vector_norm(r, dim=1)
        best, diverged = v, (alpha == 0.0) & ~broken
        active = ~(broken | right.zero | diverged)
        steps = torch.zeros_like(active, dtype=torch.long)
        for _ in range(self.steps):
            active = active & (left > system.enough(self.tol, right.norm, v)) & left.isfinite()
            if not bool(active.any()):
                break
            share = torch.where(active, alpha, 0.0).unsqueeze(1)
            product = torch.where(active.unsqueeze(1), system(r), 0.0)
            v, r, steps = v + share * r, r - share * product, steps + active
            left = torch.where(active, vector_norm(r, dim=1), left)
            broken = broken | (active & ~left.isfinite() & (steps == 1))
            diverged = torch.where(active, ~(left <= first), diverged)
            better = left < smallest
            best = torch.where(better.unsqueeze(1), v, best)
            smallest = torch.where(better, left, smallest)
        converged = smallest <= system.enough(self.tol, right.norm, best)
        reasons = {solution.CONVERGED: converged, solution.DIVERGED: diverged}
        return right.answer(best, steps, smallest, broken, reasons)
