"""The matrix written out and factored: a linear solver for small systems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
    LinearSolution,
    Matvec,
    largest_entry,
)

LARGEST = 4096


@dataclass(frozen=True)
class Direct:
    r"""The dense matrices, by Cholesky, or LU where one is indefinite.

    The implicit function theorem asks for a regular :math:`A` only, so an indefinite one is solved
    too, and the reason says that phi is no minimum. For at most 4096 unknowns; a linear head that
    Newton has solved brings its own factor, whatever its size.

    Args:
        damping: added to the diagonal of the system in the backward pass.

    Example:
        >>> import torch
        >>> from l2l_implicit import Direct
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> Direct().solve(lambda p: p @ A, torch.tensor([[1.0, 2.0]])).solution
        tensor([[0.0909, 0.6364]])
    """

    damping: float = 0.0

    takes_factor = True

    def __post_init__(self) -> None:
        checks.not_negative("Direct: damping", self.damping)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The solutions, ``[T, n]``, with their true residuals; zero for a singular matrix.

        Raises:
            ValueError: for more than 4096 unknowns.
        """
        n = b.shape[1]
        if n > LARGEST:
            raise ValueError(
                f"linear=Direct(): expected at most {LARGEST} unknowns, got {n} parameters; use "
                "linear=CG()"
            )
        scale = largest_entry(b)
        unit = b / torch.where((scale > 0) & scale.isfinite(), scale, 1.0).unsqueeze(1)
        a = _matrices(hvp, b)  # in units of b's largest entry no square overflows
        sound = scale.isfinite() & a.isfinite().all(2).all(1)
        v, reasons = torch.zeros_like(b), [NON_FINITE] * len(b)
        relative = torch.full_like(scale, math.inf)
        for task in sound.nonzero().flatten().tolist():
            v[task], reasons[task] = _factor_and_solve(a[task], unit[task])
            residual = (unit[task] - a[task] @ v[task]).norm()
            relative[task] = residual / unit[task].norm()
            if scale[task] == 0:
                relative[task], reasons[task] = 0.0, ZERO
        v = v * scale.unsqueeze(1)
        lost = ~v.sum(1).isfinite()
        for task in lost.nonzero().flatten().tolist():
            v[task], relative[task], reasons[task] = 0.0, math.inf, NON_FINITE
        return LinearSolution(v, torch.full_like(scale, n, dtype=torch.long), relative, reasons)


def _matrices(hvp: Matvec, like: Tensor) -> Tensor:
    """All products with unit vectors; the half of it that is rounding's asymmetry dropped."""
    unit, n = torch.zeros_like(like), like.shape[1]
    a = like.new_empty(len(like), n, n)
    for i in range(n):
        unit[:, i] = 1.0
        a[:, i] = hvp(unit)
        unit[:, i] = 0.0
    return (a + a.mT).mul_(0.5)


def _factor_and_solve(a: Tensor, b: Tensor) -> tuple[Tensor, str]:
    factor, failed = torch.linalg.cholesky_ex(a)
    if not bool(failed):
        return torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1), CONVERGED
    v, singular = torch.linalg.solve_ex(a, b)
    usable = not bool(singular) and bool(v.isfinite().all())
    return (v if usable else torch.zeros_like(b)), NOT_POSITIVE
