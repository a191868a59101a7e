"""Conjugate gradient, the default solver of the linear system."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, dot, largest_entry


@dataclass(frozen=True)
class CG:
    r"""Conjugate gradient: solves :math:`A v = b` for positive definite A, given by its products.

    What differs from the reference: the step size is that of the AAAI text (the extended version
    misprints it); a task stops at a relative tolerance; a start that is worse than none is dropped;
    and a task stops, saying so, where :math:`p^\top A p \le 0` or a value is not finite, before
    either reaches the answer. The last iterate is the best one: each step lowers the error in the
    norm of A, while the residual may rise, even above that of zero.

    A linear head that Newton has solved needs none of it: the factor of its inner solve is used.

    Args:
        steps: the largest number N of steps.
        tol: stop once ``norm(b - A v) <= tol * norm(b)``.
        damping: added to the diagonal of the system in the backward pass.

    References:
        Yang et al. (2025), Subroutine 1.

    Example:
        >>> import torch
        >>> from l2l_implicit import CG
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> answer = CG().solve(lambda p: p @ A, torch.tensor([[1.0, 2.0]]))
        >>> answer.solution, answer.steps, answer.reason
        (tensor([[0.0909, 0.6364]]), tensor([2]), ['converged'])
    """

    steps: int = 20
    tol: float = 1e-4
    damping: float = 0.0
    takes_factor = True

    def __post_init__(self) -> None:
        checks.count("CG: steps (N)", self.steps)
        checks.positive("CG: tol", self.tol)
        checks.not_negative("CG: damping", self.damping)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The last iterates, shape ``[T, n]``, for right-hand sides ``b`` of that shape."""
        return conjugate_gradient(hvp, b, self.steps, self.tol, start)


def conjugate_gradient(
    matvec: Matvec, b: Tensor, steps: int, tol: float, start: Tensor | None = None
) -> LinearSolution:
    """Subroutine 1 for T systems; see `CG`. All scalars are ``[T]``; p is the direction, h = A p.

    Works in place: memory is three vectors and a product, whatever happens.
    """
    scale = largest_entry(b)
    lost, zero = ~scale.isfinite(), scale == 0
    unit = torch.where(lost | zero, 1.0, scale).unsqueeze(1)
    # In units of the largest entry of b no square overflows or underflows.
    r = torch.where(lost.unsqueeze(1), 0.0, b / unit)
    b_norm, v = dot(r, r).sqrt(), torch.zeros_like(r)
    if start is not None:
        v = start / unit
        residual = r - matvec(v)
        worse = ~(dot(residual, residual).sqrt() <= b_norm).unsqueeze(1)  # nan is worse
        v, r = v.masked_fill_(worse, 0.0), torch.where(worse, r, residual)
    p, rr, threshold = r.clone(), dot(r, r), tol * b_norm
    pp = rr  # |p|^2 by its own recursion, r and the last p being orthogonal
    largest, taken = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.long)
    active, unknown, indefinite = ~(lost | zero), torch.zeros_like(zero), torch.zeros_like(zero)
    for _ in range(steps):
        active = active & ~(rr.sqrt() <= threshold)
        if not bool(active.any()):
            break
        h = matvec(p)
        curvature, square = dot(p, h), torch.where(active, pp, 1.0)
        finite = curvature.isfinite()
        largest = torch.maximum(largest, torch.where(finite, curvature / square, 0.0))
        rounding = 4.0 * torch.finfo(h.dtype).eps * largest * square
        unknown |= active & ~finite
        indefinite |= active & finite & (curvature <= rounding)
        active = active & ~(unknown | indefinite)
        if not bool(active.all()):
            h = torch.where(active.unsqueeze(1), h, 0.0)  # it may not be finite
        eta = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0).unsqueeze(1)
        v.addcmul_(eta, p)
        r.addcmul_(eta, h, value=-1.0)
        taken += active
        before, rr = rr, torch.where(active, dot(r, r), rr)
        lost = lost | ~rr.isfinite()  # nothing of it can be trusted
        active = active & ~lost
        zeta = torch.where(active, rr / torch.where(active, before, 1.0), 0.0)
        torch.addcmul(r, zeta.unsqueeze(1), p, out=p)
        pp = rr + zeta * zeta * pp
    relative, v = rr.sqrt() / torch.where(b_norm > 0, b_norm, 1.0), v.mul_(unit)
    lost = lost | ~v.sum(1).isfinite()
    if bool(lost.any()):
        v = torch.where(lost.unsqueeze(1), 0.0, v)
        relative = torch.where(lost, math.inf, relative)
    reasons = {
        solution.NON_FINITE: lost | unknown, solution.ZERO: zero,
        solution.NOT_POSITIVE: indefinite, solution.CONVERGED: rr.sqrt() <= threshold,
    }  # fmt: skip
    return LinearSolution(v, taken, relative, solution.first_reason(reasons))
