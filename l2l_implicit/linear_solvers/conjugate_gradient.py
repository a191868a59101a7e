"""Conjugate gradient, the default solver of the linear system."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
    LinearSolution,
    Matvec,
    dot,
    largest_entry,
)


@dataclass(frozen=True)
class CG:
    r"""Conjugate gradient: solves :math:`A v = b` for positive definite A, given by its products.

    What differs from the reference: the step size is that of the AAAI text (the extended version
    misprints it); a task stops at a relative tolerance; a start that is worse than none is dropped;
    and a task stops, saying so, where :math:`p^\top A p \le 0` or a value is not finite, before
    either reaches the answer. T systems take their steps together, each with its own sizes.

    The last iterate is the best one: each step lowers :math:`v^\top A v / 2 - b^\top v`, the error
    in the norm of A. The residual may rise meanwhile, even above that of zero.

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
        >>> answer.solution
        tensor([[0.0909, 0.6364]])
        >>> answer.steps, answer.reason
        (tensor([2]), ['converged'])
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
    """Subroutine 1 for T systems; see `CG`."""
    scale = largest_entry(b)
    broken, zero = ~scale.isfinite(), scale == 0
    unit = torch.where(broken | zero, 1.0, scale).unsqueeze(1)
    # In units of the largest entry of b no square overflows or underflows.
    r = torch.where(broken.unsqueeze(1), 0.0, b / unit)
    b_norm = dot(r, r).sqrt()
    v = torch.zeros_like(r)
    if start is not None:
        v = start / unit
        residual = r - matvec(v)
        worse = ~(dot(residual, residual).sqrt() <= b_norm).unsqueeze(1)  # nan is worse
        v, r = v.masked_fill_(worse, 0.0), torch.where(worse, r, residual)
    state = _State(v, r, broken, zero)
    state.run(matvec, tol * b_norm, steps)
    residual = state.rr.sqrt() / torch.where(b_norm > 0, b_norm, 1.0)
    solution = v.mul_(unit)
    lost = state.lost | ~solution.sum(1).isfinite()
    if bool(lost.any()):
        solution = torch.where(lost.unsqueeze(1), 0.0, solution)
        residual = torch.where(lost, math.inf, residual)
    pairs = zip(lost.tolist(), state.reason, strict=True)
    reasons = [NON_FINITE if gone else why for gone, why in pairs]
    return LinearSolution(solution, state.steps, residual, reasons)


class _State:
    """In the paper's names, p the direction and h = A p; all scalars are ``[T]``.

    Works in place, so that memory is the same whatever happens: three vectors and a product.
    """

    def __init__(self, v: Tensor, r: Tensor, broken: Tensor, zero: Tensor) -> None:
        self.v, self.r, self.p = v, r, r.clone()
        self.rr = dot(r, r)
        self.pp = self.rr  # |p|^2 by its own recursion, r and the last p being orthogonal
        self.largest = torch.zeros_like(self.rr)
        self.lost, self.active = broken.clone(), torch.ones_like(zero)
        self.steps = torch.zeros_like(zero, dtype=torch.long)
        self.reason = [MAX_STEPS] * len(zero)
        self.stop(broken, NON_FINITE)
        self.stop(zero, ZERO)

    def stop(self, where: Tensor, reason: str) -> None:
        """End the active tasks among ``where``."""
        ending = self.active & where
        if bool(ending.any()):
            for task in ending.nonzero().flatten().tolist():
                self.reason[task] = reason
            self.active = self.active & ~ending

    def run(self, matvec: Matvec, threshold: Tensor, steps: int) -> None:
        """Lines 3 to 12, for as long as a task is active."""
        for _ in range(steps):
            self.stop(self.rr.sqrt() <= threshold, CONVERGED)
            if not bool(self.active.any()):
                return
            self._step(matvec(self.p))
        self.stop(self.rr.sqrt() <= threshold, CONVERGED)

    def _step(self, h: Tensor) -> None:
        curvature = dot(self.p, h)
        pp = torch.where(self.active, self.pp, 1.0)
        finite = curvature.isfinite()
        self.stop(~finite, NON_FINITE)
        self.largest = torch.maximum(self.largest, torch.where(finite, curvature / pp, 0.0))
        rounding = 4.0 * torch.finfo(h.dtype).eps * self.largest * pp
        self.stop(curvature <= rounding, NOT_POSITIVE)
        if not bool(self.active.all()):
            h = torch.where(self.active.unsqueeze(1), h, 0.0)  # it may not be finite
        eta = torch.where(self.active, self.rr / torch.where(self.active, curvature, 1.0), 0.0)
        self.v.addcmul_(eta.unsqueeze(1), self.p)
        self.r.addcmul_(eta.unsqueeze(1), h, value=-1.0)
        self.steps += self.active
        rr = torch.where(self.active, dot(self.r, self.r), self.rr)
        self.lost |= ~rr.isfinite()  # nothing of it can be trusted
        self.stop(self.lost, NON_FINITE)
        zeta = torch.where(self.active, rr / torch.where(self.active, self.rr, 1.0), 0.0)
        torch.addcmul(self.r, zeta.unsqueeze(1), self.p, out=self.p)
        self.pp, self.rr = rr + zeta * zeta * self.pp, rr
