"""The truncated Neumann series, a linear solver without inner products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NON_FINITE,
    ZERO,
    LinearSolution,
    Matvec,
    no_solution,
)


def neumann_series(
    matvec: Matvec,
    b: Tensor,
    *,
    start: Tensor | None = None,
    max_steps: int = 20,
    tol: float = 1e-6,
    alpha: float | None = None,
) -> LinearSolution:
    r"""Solve :math:`A v = b` by :math:`v = \alpha \sum_{j=0}^{N-1} (I - \alpha A)^j b`.

    The summand :math:`r_j = (I - \alpha A)^j b` is also the residual of the sum before it, so the
    residual that is returned is the true one. The series converges for a positive definite
    :math:`A` and :math:`\alpha < 2 / L` with its largest eigenvalue L, at the rate of gradient
    descent: it needs about the square of CG's steps.

    Args:
        matvec: maps a vector of shape ``[n]`` to its product with ``A``.
        b: the right-hand side, shape ``[n]``.
        start: a first guess :math:`v_0`; the series is then that of ``b - A start``.
        max_steps: the number N of terms.
        tol: stop once ``norm(b - A v) <= tol * norm(b)``.
        alpha: the step size; None: 1 / L with L estimated (a few products more).

    Returns:
        The sum of the smallest residual with its diagnostics; `DIVERGED` where the residual grew
        beyond that of the start.

    References:
        Lorraine, Vicol, Duvenaud (2020), Algorithm 3.

    Example:
        >>> import torch
        >>> from l2l_implicit.linear_solvers.neumann_series import neumann_series
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> answer = neumann_series(A.mv, torch.tensor([1.0, 2.0]), max_steps=50)
        >>> answer.solution
        tensor([0.0909, 0.6364])
        >>> answer.reason
        'converged'
    """
    b_norm = float(torch.linalg.vector_norm(b))
    if not math.isfinite(b_norm):
        return no_solution(b, 0, NON_FINITE)
    if b_norm == 0.0:
        return no_solution(b, 0, ZERO)
    v, r = torch.zeros_like(b), b.clone()
    if start is not None:
        residual = b - matvec(start)
        if float(residual.norm()) <= b_norm:  # False for one that is not finite
            v, r = start.clone(), residual
    if alpha is None:
        largest = largest_curvature(matvec, b)
        if not 0.0 < largest < math.inf:
            return LinearSolution(v, 0, b_norm, 1.0, DIVERGED if largest == 0.0 else NON_FINITE)
        alpha = 1.0 / largest
    return _sum(matvec, v, r, alpha, max_steps, tol, b_norm)


def _sum(
    matvec: Matvec, v: Tensor, r: Tensor, alpha: float, max_steps: int, tol: float, b_norm: float
) -> LinearSolution:
    """The terms from the residual ``r`` of ``v`` on, both overwritten."""
    best, steps, reason = v.clone(), 0, MAX_STEPS
    best_norm = first_norm = norm = float(r.norm())
    while norm > tol * b_norm and steps < max_steps:
        product = matvec(r)
        v.add_(r, alpha=alpha)
        r.sub_(product, alpha=alpha)
        norm, steps = float(r.norm()), steps + 1
        if not math.isfinite(norm):
            reason = NON_FINITE if steps == 1 else DIVERGED
            break
        if norm < best_norm:
            best_norm = norm
            best.copy_(v)
        reason = DIVERGED if norm > first_norm else MAX_STEPS
    if best_norm <= tol * b_norm:
        reason = CONVERGED
    if not bool(torch.isfinite(best).all()):
        return no_solution(best, steps, NON_FINITE)
    return LinearSolution(best, steps, best_norm, best_norm / b_norm, reason)
