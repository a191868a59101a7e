"""What a linear solver takes and returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

if TYPE_CHECKING:
    from l2l_implicit.inner_problem.linearization import Linearization

Matvec = Callable[[Tensor], Tensor]

CONVERGED = "converged"
FACTORED = "the inner solve's factor"
MAX_STEPS = "step limit reached"
ZERO = "right-hand side is zero"
NOT_POSITIVE = "matrix is singular or indefinite along the search direction"
NON_FINITE = "non-finite value"
STALLED = "the inner solver moves no further"
INEXACT = "the difference of the solutions is inexact"
TRUNCATED = "solution too long: the loss is not convex there"
APPROXIMATED = "an approximate inverse was applied once"
DIVERGED = "series diverges: its step size is too large, or the matrix not positive definite"

REMEDIES = {
    MAX_STEPS: "give linear= more steps, or raise l2",
    NOT_POSITIVE: "raise l2, or give linear= a damping: the inner problem is not convex there",
    DIVERGED: "give linear= a smaller step_size, or take CG",
    TRUNCATED: "raise l2, or take more inner steps: away from its minimum a network is as that",
    APPROXIMATED: "take CG, or give Nystrom a higher rank, or raise l2",
    NON_FINITE: "look for nan in the data or the query loss, or raise l2",
    STALLED: "give inner= a smaller tol, use float64, or raise l2",
    INEXACT: "use float64, or give linear= another step",
}


@dataclass(frozen=True)
class LinearSolution:
    """The answers of T linear systems, and how far they can be trusted.

    Attributes:
        solution: shape ``[T, n]``; always finite.
        steps: matrix-vector products spent on each, shape ``[T]``.
        relative_residual: ``norm(b - A v) / norm(b)`` of each, shape ``[T]``; 0 for ``b = 0``,
            ``inf`` where unknown.
        reason: why the solver stopped, one text for each task.
        outputs: for a linear head, the loss's Hessian times the head's outputs along ``solution``,
            where that is known better than from ``solution``; else None.
        products: the mixed products with ``solution``, one for each of the linearization's
            sources, where the solver has taken them on its way; else None.
        products_error: how wrong these may be beyond ``solution``, relative, shape ``[T]``.

    Example:
        >>> import torch
        >>> from l2l_implicit import CG
        >>> answer = CG().solve(lambda p: p * torch.tensor([1.0, -1.0]), torch.ones(1, 2))
        >>> answer.reason, answer.solution
        (['matrix is singular or indefinite along the search direction'], tensor([[0., 0.]]))
    """

    solution: Tensor
    steps: Tensor
    relative_residual: Tensor
    reason: Sequence[str]
    outputs: Tensor | None = None
    products: list[Tensor | None] | None = None
    products_error: Tensor | None = None


class LinearSolver(Protocol):
    """Settings and a method: solves ``(A + damping I) v = b`` for T symmetric matrices A.

    A linear head whose inner problem was solved exactly brings that solve's factor, nearer than any
    tolerance: a solver with an attribute ``takes_factor`` equal to True is not asked then.

    Attributes:
        damping: added to the diagonal of every A by the learner; ``hvp`` is that of the sum.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead, LinearSolution
        >>> class FirstOrder:  # v = b, as if H were the identity
        ...     damping = 0.0
        ...     def solve(self, hvp, b, start=None):
        ...         left = (b - hvp(b)).norm(dim=1) / b.norm(dim=1)
        ...         return LinearSolution(b, torch.ones(len(b)), left, ["identity"] * len(b))
        >>> ImplicitCGHead(nn.Linear(4, 2), lr=0.1, linear=FirstOrder()).linear.damping
        0.0
    """

    @property
    def damping(self) -> float: ...

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """The solutions, all shapes ``[T, n]``, perhaps from a first guess ``start``.

        The answer is finite; what was not solved says so by its residual and its reason.
        """
        ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products task by task, ``[T, n], [T, n] -> [T]``."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


class RightHandSides:
    """T right-hand sides in units, powers of two, in which no square overflows or underflows.

    Attributes:
        units: ``[T, 1]``; ``scaled``: ``b`` in them, ``[T, n]``, zero where it is not finite, and
        its ``norm``, ``[T]``; ``zero``, ``lost``: whether ``b`` is zero, or not finite, ``[T]``.
    """

    def __init__(self, b: Tensor) -> None:
        largest = b.abs().amax(1) if b.shape[1] else b.new_zeros(len(b))
        self.zero, self.lost = largest == 0, ~largest.isfinite()
        units = largest / (2.0 * torch.frexp(largest).mantissa)
        self.units = torch.where(self.zero | self.lost, 1.0, units).unsqueeze(1)
        self.scaled = torch.where(self.lost.unsqueeze(1), 0.0, b / self.units)
        self.norm = vector_norm(self.scaled, dim=1)

    def begin(self, system: Matvec, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """``start``, and its residual; where that is worse than zero's, or not finite, zero."""
        if start is None:
            return torch.zeros_like(self.scaled), self.scaled
        v = start / self.units
        residual = self.scaled - system(v)
        better = (vector_norm(residual, dim=1) <= self.norm).unsqueeze(1)
        return v.masked_fill_(~better, 0.0), torch.where(better, residual, self.scaled)

    def answer(
        self, v: Tensor, steps: Tensor, left: Tensor, lost: Tensor, reasons: Mapping[str, Tensor]
    ) -> LinearSolution:
        """``v``, which is overwritten, in ``b``'s own units.

        Args:
            v, left: the solution, ``[T, n]``, and the norm of its residual, ``[T]``.
            lost: of which nothing can be trusted, ``[T]``.
            reasons: texts and whether each holds, ``[T]``: the first is told, or `MAX_STEPS`.
        """
        v = v.mul_(self.units).to(self.units.dtype)
        lost = lost | self.lost | ~v.sum(1).isfinite()
        relative = torch.where(lost, math.inf, left / torch.where(self.zero, 1.0, self.norm))
        masks = torch.stack([lost, self.zero, *reasons.values()], 1).tolist()
        texts = [NON_FINITE, ZERO, *reasons]
        told = [next(itertools.compress(texts, row), MAX_STEPS) for row in masks]
        return LinearSolution(
            v.masked_fill_(lost.unsqueeze(1), 0.0), steps, relative.to(v.dtype), told
        )


class System:
    """Products with ``A + damping I``: the ``hvp`` that a learner hands to its linear solver.

    A solver may take any function of vectors for it, and asks `of` where it wants to know more.

    Args:
        matvec: products with A, ``[T, n] -> [T, n]``.
        damping: what is added to A's diagonal.
        at: the linearization whose Hessian A is; None where only the products are known.
        accuracy: relative error of the solution at which to stop; None: the solver's tolerance.

    Attributes:
        shift: the multiple of the identity that is known to be in the matrix: l2 plus damping.
        calls: how many products there were.
    """

    def __init__(
        self, matvec: Matvec, damping: float = 0.0, at: Linearization | None = None,
        accuracy: float | None = None,
    ) -> None:  # fmt: skip
        self._matvec, self.damping, self.at = matvec, damping, at
        self.shift = damping if at is None else damping + at.quadratic.strength
        self.calls, self._accuracy = 0, accuracy

    @classmethod
    def of(cls, hvp: Matvec) -> System:
        """``hvp`` itself, or products of which nothing else is known."""
        return hvp if isinstance(hvp, cls) else cls(hvp)

    def __call__(self, vector: Tensor) -> Tensor:
        self.calls += 1
        product = self._matvec(vector)
        return torch.add(product, vector, alpha=self.damping) if self.damping else product

    def enough(self, tol: float, b_norm: Tensor, v: Tensor) -> Tensor:
        r"""The norm of a residual that is small enough, ``[T]``.

        That is ``tol`` times b's, or where the learner has an ``accuracy`` that much times
        :math:`\mu \|v\|`, :math:`\mu` the `shift`: what is left of :math:`A^{-1} b` is then at
        most that much of v, if the loss is convex.
        """
        if self._accuracy is None:
            return tol * b_norm
        scale = self.shift * vector_norm(v, dim=1) if self.shift > 0.0 else b_norm
        return self._accuracy * scale


def applied_once(
    hvp: Matvec, b: Tensor, inverse: Matvec, reasons: Mapping[str, Tensor]
) -> LinearSolution:
    """``inverse(b)`` as the solution, with its true residual, for which one product is spent."""
    right = RightHandSides(b)
    v = inverse(right.scaled)
    left = vector_norm(right.scaled - hvp(v), dim=1)
    steps, lost = torch.ones_like(left, dtype=torch.long), ~left.isfinite()
    return right.answer(v, steps, left, lost, {**reasons, APPROXIMATED: ~lost})
