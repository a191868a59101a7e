"""What a linear solver takes and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]

CONVERGED = "converged"
MAX_STEPS = "step limit reached"
ZERO = "right-hand side is zero"
NOT_POSITIVE = "matrix is singular or indefinite along the search direction"
NON_FINITE = "non-finite value"
DIVERGED = "series diverges: its step size is too large, or the matrix not positive definite"


@dataclass(frozen=True)
class LinearSolution:
    """The answer of a linear solver, and how far it can be trusted.

    Attributes:
        solution: the answer, shape ``[n]``; always finite.
        steps: matrix-vector products spent on the iterates.
        residual_norm: Euclidean norm of ``b - A solution``, as the recursion carries it.
        relative_residual: ``residual_norm / norm(b)``; 0 for ``b = 0``, ``inf`` where unknown.
        reason: why the solver stopped, one of this module's constants.

    Example:
        >>> import torch
        >>> from l2l_implicit import conjugate_gradient
        >>> answer = conjugate_gradient(torch.diag(torch.tensor([1.0, -1.0])).mv, torch.ones(2))
        >>> answer.reason
        'matrix is singular or indefinite along the search direction'
        >>> answer.solution, answer.relative_residual
        (tensor([0., 0.]), 1.0)
    """

    solution: Tensor
    steps: int
    residual_norm: float
    relative_residual: float
    reason: str


LinearSolver = Callable[[Matvec, Tensor, Tensor | None], LinearSolution]


def damped(matvec: Matvec, damping: float) -> Matvec:
    """Products with ``A + damping I``."""
    return lambda vector: torch.add(matvec(vector), vector, alpha=damping)


def no_solution(b: Tensor, steps: int, reason: str) -> LinearSolution:
    """Zero, where nothing better is known."""
    if reason == ZERO:
        return LinearSolution(torch.zeros_like(b), steps, 0.0, 0.0, reason)
    return LinearSolution(torch.zeros_like(b), steps, math.inf, math.inf, reason)


def of_larger_system(part: LinearSolution, v: Tensor, b: Tensor) -> LinearSolution:
    """The solution ``v`` of a system with right-hand side ``b``, of which only ``part`` was hard.

    The rest was solved exactly, so the residual is that of the part.
    """
    if part.reason == NON_FINITE:
        return no_solution(b, part.steps, NON_FINITE)
    norm = float(torch.linalg.vector_norm(b))
    if not 0.0 < norm < math.inf:
        return replace(part, solution=v)
    reason = CONVERGED if part.reason == ZERO else part.reason
    return LinearSolution(v, part.steps, part.residual_norm, part.residual_norm / norm, reason)
