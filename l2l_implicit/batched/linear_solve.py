"""Hessian-inverse-vector products of T tasks at once, without asking the device for a number.

Every branch of `l2l_implicit.conjugate_gradient` is a mask here: a task that is done stays as it
is while the others go on. Loops end early on a CPU, where asking is free, and elsewhere only every
``ask_every`` steps, since asking waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit.batched.objective import BatchedLinearization
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
)

INEXACT = "direct solve ended by rounding"
REASONS = (MAX_STEPS, CONVERGED, ZERO, NOT_POSITIVE, NON_FINITE, INEXACT)
_CODE = {reason: code for code, reason in enumerate(REASONS)}

# Larger systems [T, size, size] cost more to build and factor than conjugate gradient's products.
LARGEST_DIRECT = 512


class BatchedSolution(NamedTuple):
    """Answers of T linear systems.

    Attributes:
        solution: ``[T, n]``; always finite.
        steps: Hessian-vector products spent on each task, ``[T]``.
        relative_residual: ``norm(b - A v) / norm(b)``, ``[T]``; 0 for b = 0, ``inf`` where unknown.
        reason: why each ended, ``[T]``, indices into `REASONS`.
    """

    solution: Tensor
    steps: Tensor
    relative_residual: Tensor
    reason: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products task by task, ``[T, n], [T, n] -> [T]``."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


def none_left(active: Tensor, step: int, ask_every: int) -> bool:
    """Whether no task is active; False at the steps at which the device is not asked."""
    ask = asking_is_free(active) or (ask_every > 0 and step > 0 and step % ask_every == 0)
    return ask and not bool(active.any())


def asking_is_free(tensor: Tensor) -> bool:
    """Whether reading a value waits for no queue."""
    return tensor.device.type == "cpu"


def batched_conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    max_steps: int,
    tol: float | Tensor,
    ask_every: int = 0,
) -> BatchedSolution:
    """Solve T symmetric positive definite systems ``A_t v_t = b_t``.

    The same iterates as `l2l_implicit.conjugate_gradient` task by task, with each task's own step
    sizes, stopping point and guards.

    Args:
        matvec: ``[T, n] -> [T, n]``.
        b: right-hand sides, ``[T, n]``.
        max_steps: the largest number N of steps.
        tol: relative residual at which a task stops; one number, or ``[T]``.
        ask_every: steps between two looks at whether all tasks are done; 0: only on a CPU.

    References:
        Yang et al. (2025), Subroutine 1.
    """
    scale = b.abs().amax(1)
    broken, zero = ~scale.isfinite(), scale == 0
    unit = torch.where(broken | zero, torch.ones_like(scale), scale)
    r = torch.where(broken.unsqueeze(1), 0.0, b / unit.unsqueeze(1))
    state = _State(r, broken, zero)
    b_norm = state.rr.sqrt()
    threshold = tol * b_norm
    for step in range(max_steps):
        state.stop(state.rr.sqrt() <= threshold, CONVERGED)
        if none_left(state.active, step, ask_every):
            break
        state.step(matvec(state.p))
    state.stop(state.rr.sqrt() <= threshold, CONVERGED)
    residual = state.rr.sqrt() / torch.where(b_norm > 0, b_norm, 1.0)
    solution = state.v * unit.unsqueeze(1)
    lost = broken | ~solution.sum(1).isfinite()
    solution = torch.where(lost.unsqueeze(1), 0.0, solution)
    residual = torch.where(lost, math.inf, residual)
    reason = torch.where(lost, _CODE[NON_FINITE], state.reason)
    return BatchedSolution(solution, state.steps, residual, reason)


class _State:
    """The iteration of Subroutine 1, in its names; all scalars are ``[T]``."""

    def __init__(self, r: Tensor, broken: Tensor, zero: Tensor) -> None:
        self.r, self.p = r, r.clone()
        self.v = torch.zeros_like(r)
        self.rr = self.pp = dot(r, r)
        self.largest = torch.zeros_like(self.rr)
        self.active = torch.ones_like(zero)
        self.steps = torch.zeros_like(zero, dtype=torch.long)
        self.reason = torch.full_like(self.steps, _CODE[MAX_STEPS])
        self.stop(broken, NON_FINITE)
        self.stop(zero, ZERO)

    def stop(self, where: Tensor, reason: str) -> None:
        """End the active tasks among ``where``."""
        ending = self.active & where
        self.reason = torch.where(ending, _CODE[reason], self.reason)
        self.active = self.active & ~where

    def step(self, h: Tensor) -> None:
        """One step from ``h = A p``; tasks that are done keep what they have."""
        curvature = dot(self.p, h)
        pp = torch.where(self.active, self.pp, 1.0)
        self.largest = torch.maximum(self.largest, curvature / pp)
        self.stop(~curvature.isfinite(), NON_FINITE)
        eps = torch.finfo(h.dtype).eps
        self.stop(curvature <= eps * self.largest * pp, NOT_POSITIVE)
        going = self.active.unsqueeze(1)
        eta = (self.rr / torch.where(self.active, curvature, 1.0)).unsqueeze(1)
        self.v = torch.where(going, torch.addcmul(self.v, eta, self.p), self.v)
        self.r = torch.where(going, torch.addcmul(self.r, eta, h, value=-1.0), self.r)
        self.steps = self.steps + self.active
        rr = dot(self.r, self.r)
        lost = self.active & ~rr.isfinite()
        self.stop(lost, NON_FINITE)
        self.v = torch.where(lost.unsqueeze(1), math.nan, self.v)
        zeta = torch.where(self.active, rr / self.rr, 0.0)
        self.p = torch.addcmul(self.r, zeta.unsqueeze(1), self.p)
        self.pp, self.rr = rr + zeta * zeta * self.pp, rr


class GramFactor:
    r"""Direct solves in the dimension of the support examples.

    With :math:`A` the map from phi to the logits, :math:`H = A^\top L L^\top A + l_2 I`, and so

    .. math:: v = \tfrac{1}{l_2} (b - A^\top L z), \qquad
              (l_2 I + L^\top A A^\top L) \, z = L^\top A b,

    whose matrix is factored once by a batched Cholesky. One refinement with the true residual
    makes good what rounding (divided by l2) and the matrix's tiny shift took.
    """

    def __init__(self, at: BatchedLinearization, gram: Tensor) -> None:
        self._at = at
        matrix = at.curvature.weighted_gram(gram)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        shift = 4.0 * torch.finfo(matrix.dtype).eps * diagonal.amax(1, keepdim=True)
        diagonal.add_(shift + at.objective.l2)
        self._factor, _ = torch.linalg.cholesky_ex(matrix)

    def solve(self, b: Tensor, tol: float) -> BatchedSolution:
        """``H v = b``, shapes ``[T, n]``; reason `INEXACT` where the residual exceeds ``tol``."""
        v = self.solve_once(b)
        v = v + self.solve_once(b - self._at.hvp(v))
        norm = torch.linalg.vector_norm(b, dim=1)
        residual = torch.linalg.vector_norm(b - self._at.hvp(v), dim=1)
        relative = torch.where(norm > 0, residual / norm, residual)
        broken, useless = ~norm.isfinite(), ~(relative <= 1.0)  # zero has residual 1
        v = torch.where(useless.unsqueeze(1), 0.0, v)
        relative = torch.where(useless, (norm != 0).to(norm.dtype), relative)
        relative = torch.where(broken, math.inf, relative)
        reason = torch.full_like(broken, _CODE[CONVERGED], dtype=torch.long)
        reason = torch.where(relative > tol, _CODE[INEXACT], reason)
        reason = torch.where(norm == 0, _CODE[ZERO], reason)
        reason = torch.where(broken, _CODE[NON_FINITE], reason)
        return BatchedSolution(v, torch.full_like(reason, 2), relative, reason)

    def solve_once(self, b: Tensor) -> Tensor:
        """``H v = b`` as far as rounding lets it be, no refinement."""
        objective, curvature = self._at.objective, self._at.curvature
        right = curvature.root_transposed(objective.logits(b))
        # Two triangular solves: on a GPU torch may run cholesky_solve matrix by matrix.
        half = torch.linalg.solve_triangular(self._factor, right, upper=False)
        z = torch.linalg.solve_triangular(self._factor.mT, half, upper=True)
        return (b - objective.in_phi(curvature.root(z))) / objective.l2


class LinearSolver(NamedTuple):
    """How the systems are solved: ``direct``, or by conjugate gradient of N steps."""

    direct: bool
    cg_steps: int
    cg_tol: float
    ask_every: int = 0

    def solve(self, at: BatchedLinearization, b: Tensor) -> BatchedSolution:
        """``H v = b`` to ``cg_tol``; shapes ``[T, n]``."""
        if self.direct:
            return GramFactor(at, at.objective.gram()).solve(b, self.cg_tol)
        return batched_conjugate_gradient(at.hvp, b, self.cg_steps, self.cg_tol, self.ask_every)

    def direction(
        self, at: BatchedLinearization, b: Tensor, tol: Tensor, gram: Tensor | None
    ) -> Tensor:
        """``H v = b`` well enough for one Newton step: to ``tol`` (``[T]``), or directly."""
        if gram is not None:
            return GramFactor(at, gram).solve_once(b)
        answer = batched_conjugate_gradient(at.hvp, b, self.cg_steps, tol, self.ask_every)
        return answer.solution
