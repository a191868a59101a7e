"""Conjugate gradient, the default solver of the linear system."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
    LinearSolution,
    Matvec,
    no_solution,
)


def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    *,
    start: Tensor | None = None,
    max_steps: int = 20,
    tol: float = 1e-6,
) -> LinearSolution:
    r"""Solve :math:`A v = b` for a symmetric positive definite :math:`A`, given by its products.

    What differs from the reference: the step size is that of the AAAI text (the extended version
    misprints it); the solver stops at a relative tolerance; a start that is worse than none is
    dropped; and it stops, saying so, where :math:`p^\top A p \le 0` or a value is not finite,
    before either reaches the answer.

    The last iterate is the best one: each step lowers :math:`v^\top A v / 2 - b^\top v`, the error
    in the norm of A. The residual may rise meanwhile, even above that of zero.

    Args:
        matvec: maps a vector ``p`` of shape ``[n]`` to ``A p`` of the same shape.
        b: the right-hand side, shape ``[n]``.
        start: a first guess (warm start) of shape ``[n]``; zero if None.
        max_steps: the largest number N of steps.
        tol: stop once ``norm(b - A v) <= tol * norm(b)``.

    Returns:
        The last iterate, shape ``[n]``, with its diagnostics.

    References:
        Yang et al. (2025), Subroutine 1.

    Example:
        >>> import torch
        >>> from l2l_implicit import conjugate_gradient
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> answer = conjugate_gradient(A.mv, torch.tensor([1.0, 2.0]))
        >>> answer.solution
        tensor([0.0909, 0.6364])
        >>> answer.steps, answer.reason
        (2, 'converged')
    """
    scale = float(b.abs().max()) if b.numel() else 0.0
    if not math.isfinite(scale):
        return no_solution(b, 0, NON_FINITE)
    if scale == 0.0:
        return no_solution(b, 0, ZERO)
    # In units of the largest entry of b no square overflows or underflows.
    unit_b = b / scale
    b_norm = math.sqrt(float(unit_b.dot(unit_b)))
    v, r = _first_iterate(matvec, unit_b, b_norm, start, scale)
    del unit_b  # the residual from now on, or of no more use
    steps, r_norm, reason = _iterate(matvec, v, r, tol * b_norm, max_steps)
    v *= scale
    if not math.isfinite(float(v.sum())):
        return no_solution(b, steps, NON_FINITE)
    return LinearSolution(v, steps, r_norm * scale, r_norm / b_norm, reason)


def _first_iterate(
    matvec: Matvec, b: Tensor, b_norm: float, start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The start and its residual; zero and ``b`` if that is nearer."""
    if start is not None:
        v = start / scale
        r = b - matvec(v)
        if float(r.norm()) <= b_norm:  # False for a residual that is not finite
            return v, r
    return torch.zeros_like(b), b


def _iterate(
    matvec: Matvec, v: Tensor, r: Tensor, threshold: float, max_steps: int
) -> tuple[int, float, str]:
    """Subroutine 1, lines 3 to 12; in its names, with p the direction and h = A p.

    Works in place, so that memory is the same whatever happens: three vectors and a product.
    """
    p, rr = r.clone(), float(r.dot(r))
    pp = rr  # |p|^2 by its own recursion, r and the last p being orthogonal
    largest = 0.0
    for n in range(max_steps):
        if math.sqrt(rr) <= threshold:
            return n, math.sqrt(rr), CONVERGED
        h = matvec(p)
        curvature = float(p.dot(h))
        largest = max(largest, curvature / pp)
        if not math.isfinite(curvature):
            return n, math.sqrt(rr), NON_FINITE
        if curvature <= torch.finfo(p.dtype).eps * largest * pp:
            return n, math.sqrt(rr), NOT_POSITIVE
        eta = rr / curvature
        v.add_(p, alpha=eta)
        r.sub_(h, alpha=eta)
        rr, rr_before = float(r.dot(r)), rr
        if not math.isfinite(rr):
            v.fill_(math.nan)  # nothing of it can be trusted
            return n + 1, math.inf, NON_FINITE
        zeta = rr / rr_before
        torch.add(r, p, alpha=zeta, out=p)
        pp = rr + zeta * zeta * pp
    reason = CONVERGED if math.sqrt(rr) <= threshold else MAX_STEPS
    return max_steps, math.sqrt(rr), reason
