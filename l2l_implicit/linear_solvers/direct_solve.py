"""The matrix written out and factored: a linear solver for small systems."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
    LinearSolution,
    Matvec,
    no_solution,
)

LARGEST = 4096


def direct_solve(matvec: Matvec, b: Tensor) -> LinearSolution:
    r"""Solve :math:`A v = b` for a symmetric :math:`A` by Cholesky, or LU where it is indefinite.

    The implicit function theorem asks for a regular :math:`A` only, so an indefinite one is solved
    too, and `NOT_POSITIVE` says that phi is no minimum.

    Args:
        matvec: maps a vector of shape ``[n]`` to its product with ``A``; called n times.
        b: the right-hand side, shape ``[n]``.

    Returns:
        The solution with its true residual; zero for a singular matrix.

    Raises:
        ValueError: for more than 4096 unknowns.

    Example:
        >>> import torch
        >>> from l2l_implicit.linear_solvers.direct_solve import direct_solve
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> direct_solve(A.mv, torch.tensor([1.0, 2.0])).solution
        tensor([0.0909, 0.6364])
    """
    n = b.numel()
    if n > LARGEST:
        raise ValueError(
            f"solver='direct': expected at most {LARGEST} unknowns (parameters, or samples times "
            f"classes of a linear head in closed form), got {n}; use solver='cg'"
        )
    scale = float(b.abs().max()) if n else 0.0
    if not math.isfinite(scale):
        return no_solution(b, 0, NON_FINITE)
    if scale == 0.0:
        return no_solution(b, 0, ZERO)
    a = _matrix(matvec, b)
    if not bool(torch.isfinite(a).all()):
        return no_solution(b, n, NON_FINITE)
    unit = b / scale  # no square of it overflows or underflows
    v, reason = _factor_and_solve(a, unit)
    residual, b_norm, v = float((unit - a @ v).norm()), float(unit.norm()), scale * v
    if not bool(torch.isfinite(v).all()) or not math.isfinite(residual):
        return no_solution(b, n, NON_FINITE)
    return LinearSolution(v, n, scale * residual, residual / b_norm, reason)


def _matrix(matvec: Matvec, like: Tensor) -> Tensor:
    """All products with unit vectors; the half of it that is rounding's asymmetry dropped."""
    unit, a = torch.zeros_like(like), like.new_empty(like.numel(), like.numel())
    for i in range(len(unit)):
        unit[i] = 1.0
        a[i] = matvec(unit)
        unit[i] = 0.0
    return (a + a.t()).mul_(0.5)


def _factor_and_solve(a: Tensor, b: Tensor) -> tuple[Tensor, str]:
    factor, failed = torch.linalg.cholesky_ex(a)
    if not bool(failed):
        return torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1), CONVERGED
    v, singular = torch.linalg.solve_ex(a, b)
    usable = not bool(singular) and bool(torch.isfinite(v).all())
    return (v if usable else torch.zeros_like(b)), NOT_POSITIVE
