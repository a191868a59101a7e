"""Steps of the inner solver: from a linearization of the inner objective to the next phi.

The hypergradient does not care how the inner minimum was found, only that it was.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from l2l_implicit.linear_solve import conjugate_gradient
from l2l_implicit.linearization import Linearization


class InnerStep(Protocol):
    """Proposes phi, shape ``[n]``, from the linearization at the present one; may keep state.

    One that returns ``at.point`` itself says that there is nothing left to do.
    """

    def __call__(self, at: Linearization) -> Tensor: ...


class GradientStep:
    r"""Gradient descent, :math:`\phi - \lambda_\phi \nabla_\phi g`: Algorithm 1, line 8."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, at: Linearization) -> Tensor:
        return at.point - self.lr * at.gradient


class _Step(NamedTuple):
    """Where a step began, the whole of it, and the objective, its slope and gradient there."""

    point: Tensor
    direction: Tensor
    objective: float
    slope: float
    gradient_norm: float


class NewtonStep:
    r"""Damped Newton-CG: :math:`H s = -\nabla_\phi g` on the kept graph, with backtracking.

    The objective is known only when the next linearization arrives. If by then it has not fallen
    by the Armijo rule, the step is taken back in part, along the same direction, before a new
    direction is tried. Where the curvature is not positive the direction is the gradient's,
    with length ``lr``.

    Args:
        lr: step size of the gradient step that stands in for a failed Newton direction.
        max_steps: the most Hessian-vector products a direction may cost.
        tol: the gradient's norm, relative to its first, at which phi is left where it is.
    """

    _FORCING, _ARMIJO, _MOST_CUTS = 0.1, 1e-4, 20

    def __init__(self, lr: float, max_steps: int, tol: float) -> None:
        self.lr, self.max_steps, self.tol = lr, max_steps, tol
        self._last: _Step | None = None
        self._first_norm = 0.0
        self._length, self._cuts = 1.0, 0

    def __call__(self, at: Linearization) -> Tensor:
        if self._rejects(at):
            return self._shorten(at)
        self._first_norm = max(self._first_norm, at.gradient_norm)
        stop = max(self.tol, 10 * torch.finfo(at.point.dtype).eps)
        if at.gradient_norm <= stop * self._first_norm:
            self._last = None
            return at.point
        direction = self._direction(at, at.gradient_norm / self._first_norm, stop)
        slope = float(direction.dot(at.gradient))
        self._last = _Step(at.point, direction, at.objective, slope, at.gradient_norm)
        # After cuts, grow back step by step: each cut costs the evaluation of a loss.
        self._length, self._cuts = min(1.0, 2.0 * self._length), 0
        return at.point + self._length * direction

    def _direction(self, at: Linearization, progress: float, stop: float) -> Tensor:
        """Inexact Newton: the nearer the minimum, the smaller the residual asked for."""
        tol = min(self._FORCING, max(progress, 0.5 * stop / progress))
        answer = conjugate_gradient(at.hvp, -at.gradient, max_steps=self.max_steps, tol=tol)
        descends = float(answer.solution.dot(at.gradient)) < 0
        return answer.solution if descends else -self.lr * at.gradient

    def _rejects(self, at: Linearization) -> bool:
        if self._last is None or self._cuts >= self._MOST_CUTS:
            return False
        last, now = self._last, at.objective
        if not math.isfinite(now):
            return True
        rounding = 10 * torch.finfo(at.point.dtype).eps * max(abs(last.objective), abs(now))
        if abs(now - last.objective) <= rounding:  # flat to the last digit: ask the gradient
            return at.gradient_norm > last.gradient_norm
        return now > last.objective + self._ARMIJO * self._length * last.slope

    def _shorten(self, at: Linearization) -> Tensor:
        """Go back to the minimum of the parabola through the two values and the slope."""
        assert self._last is not None
        last = self._last
        expected = last.slope * self._length
        excess = at.objective - last.objective - expected
        cut = -expected / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.1
        self._length *= min(0.5, max(0.1, cut))
        self._cuts += 1
        return last.point + self._length * last.direction
