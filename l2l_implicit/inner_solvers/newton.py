"""Newton-CG, also called Hessian-free, with a line search and with care where H is indefinite."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.gradient_descent import Stop
from l2l_implicit.linear_solvers.conjugate_gradient import conjugate_gradient
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec


class _Step(NamedTuple):
    """Where a step began, the whole of it, and the objective, its slope and gradient there."""

    point: Tensor
    direction: Tensor
    objective: float
    slope: float
    gradient_norm: float


class _Trial(NamedTuple):
    """The objective and its gradient's norm at a point that was tried."""

    objective: float
    gradient_norm: float
    point: Tensor


class NewtonStep:
    r"""Truncated Newton: CG on :math:`H s = -\nabla_\phi g`, with a backtracking line search.

    With a loss tensor the objective is known only when the next linearization arrives: if by then
    it has not fallen by the Armijo rule, the step is taken back in part, along the same direction,
    before a new direction is tried. With a closure, and no closed form, it is searched at once.

    CG ends where it meets a direction of negative curvature, and what it has by then is the step;
    where that is zero (the gradient itself is such a direction), the step is a gradient step of
    size ``lr``.

    Args:
        lr: step size of the gradient step that stands in for a failed Newton direction; None:
            1 over the curvature along the gradient, in modulus.
        max_steps: the most Hessian-vector products a direction may cost.
        tol: the gradient's norm, relative to its first, at which phi is left where it is.

    References:
        Rajeswaran et al. (2019), section 4 (Hessian-free); Nocedal, Wright (2006), Algorithm 7.1.
    """

    needs_hvp = True
    _FORCING, _ARMIJO, _MOST_CUTS = 0.1, 1e-4, 20

    def __init__(self, lr: float | None, max_steps: int, tol: float) -> None:
        self.lr, self.max_steps, self.tol = lr, max_steps, tol
        self._stop = Stop(tol)
        self._last: _Step | None = None
        self._length, self._cuts = 1.0, 0

    def __call__(self, at: Linearization) -> Tensor:
        if self._rejects(at):
            return self._shorten(at)
        if self._stop(at):
            self._last = None
            return at.point
        direction = self._direction(at)
        slope = float(direction.dot(at.gradient))
        self._last = _Step(at.point, direction, at.objective, slope, at.gradient_norm)
        # After cuts, grow back step by step: each cut costs the evaluation of a loss.
        self._length, self._cuts = min(1.0, 2.0 * self._length), 0
        trial = at.point + self._length * direction
        at_once = at.elsewhere is not None and not at.closed_form
        return self._search(at, trial) if at_once else trial

    def _search(self, at: Linearization, trial: Tensor) -> Tensor:
        """Backtrack from ``trial`` now, since the objective can be computed there."""
        for _ in range(self._MOST_CUTS):
            objective, gradient = at.evaluate(trial)
            there = _Trial(objective, float(gradient.norm()), trial)
            if not self._rejects(there):
                break
            trial = self._shorten(there)
        return trial

    def _direction(self, at: Linearization) -> Tensor:
        """Inexact Newton: the nearer the minimum, the smaller the residual asked for."""
        exact = at.newton_direction()
        if exact is not None:
            return exact
        progress = self._stop.progress(at)
        tol = min(self._FORCING, max(progress, 0.5 * self._stop.floor(at) / progress))

        def solver(matvec: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
            return conjugate_gradient(matvec, b, max_steps=self.max_steps, tol=tol)

        direction = at.solve(-at.gradient, solver).solution
        if float(direction.dot(at.gradient)) < 0:
            return direction
        return -self._gradient_step(at) * at.gradient

    def _gradient_step(self, at: Linearization) -> float:
        if self.lr is not None:
            return self.lr
        curvature = abs(float(at.gradient.dot(at.hvp(at.gradient)))) / at.gradient_norm**2
        return 1.0 / curvature if curvature > 0.0 else 1.0

    def _rejects(self, at: Linearization | _Trial) -> bool:
        if self._last is None or self._cuts >= self._MOST_CUTS:
            return False
        last, now = self._last, at.objective
        if not math.isfinite(now):
            return True
        rounding = 10 * torch.finfo(at.point.dtype).eps * max(abs(last.objective), abs(now))
        if abs(now - last.objective) <= rounding:  # flat to the last digit: ask the gradient
            return at.gradient_norm > last.gradient_norm
        return now > last.objective + self._ARMIJO * self._length * last.slope

    def _shorten(self, at: Linearization | _Trial) -> Tensor:
        """Go back to the minimum of the parabola through the two values and the slope."""
        assert self._last is not None
        last = self._last
        expected = last.slope * self._length
        excess = at.objective - last.objective - expected
        cut = -expected / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.1
        self._length *= min(0.5, max(0.1, cut))
        self._cuts += 1
        return last.point + self._length * last.direction
