"""Newton's method: exact for linear heads, Newton-CG (Hessian-free) for everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.protocol import Stop
from l2l_implicit.linear_solvers.conjugate_gradient import conjugate_gradient

_FORCING, _ARMIJO, _MOST_CUTS = 0.1, 1e-4, 20


@dataclass(frozen=True)
class Newton:
    r"""Newton's method, with care where H is indefinite.

    A recognised linear head (cross-entropy or squared error, l2 > 0) is solved exactly, at the
    first ``adapt``, whatever the number of steps; further calls with the same data change nothing.

    Any other module takes one Newton-CG step for each ``adapt(loss)``, or step of a closure. With a
    loss tensor the objective is known only when the next linearization arrives: if by then it has
    not fallen by the Armijo rule, the step is taken back in part, along the same direction, before
    a new direction is tried. With a closure it is searched at once. Conjugate gradient ends where
    it meets a direction of negative curvature, and what it has by then is the step; where that is
    zero (the gradient itself is such a direction), the step is a gradient step of size ``lr``.

    Args:
        cg_steps: the most Hessian-vector products a direction may cost.
        tol: the gradient's norm, relative to its largest, at which phi is left where it is.

    References:
        Rajeswaran et al. (2019), section 4 (Hessian-free); Nocedal, Wright (2006), Algorithm 7.1.

    Example:
        >>> from l2l_implicit import Newton
        >>> Newton(cg_steps=5)
        Newton(cg_steps=5, tol=1e-05)
    """

    cg_steps: int = 20
    tol: float = 1e-5

    at_once = True

    def __post_init__(self) -> None:
        checks.count("Newton: cg_steps", self.cg_steps)
        checks.positive("Newton: tol", self.tol)

    def begin(self, lr: float) -> NewtonStep:
        """The state of a new task."""
        return NewtonStep(lr, self.cg_steps, self.tol)

    def solve_heads(self, at: LinearHeads, steps: int, lr: float) -> LinearHeads | None:
        """All T tasks at their minima; None without a regulariser, where there may be none."""
        if at.quadratic.strength == 0.0:
            return None
        return at.minimum() or _many_samples(at, lr)


def _many_samples(at: LinearHeads, lr: float) -> LinearHeads:
    """Tasks of too many samples for a factor, one after the other, by conjugate gradient."""
    points, steps = [], []
    for t in range(len(at.point)):
        step = NewtonStep(lr, cg_steps=500, tol=1e-10)
        here = at.task(t)
        count = 0
        while count < 100 and (point := step(here)) is not here.point:
            here, count = here.moved(point), count + 1
        points.append(here.point)
        steps.append(count)
    there = at.moved(torch.cat(points))
    there.solved, there.steps = True, torch.tensor(steps, device=at.point.device)
    return there


class _Step(NamedTuple):
    """Where a step began, the whole of it, and the objective, its slope and gradient there."""

    point: Tensor
    direction: Tensor
    objective: float
    slope: float
    gradient_norm: float


class _Trial(NamedTuple):
    """A point with its objective and its gradient's norm."""

    point: Tensor
    objective: float
    gradient_norm: float


class NewtonStep:
    """The state of `Newton` for one task, T = 1."""

    needs_hvp = True

    def __init__(self, lr: float, cg_steps: int, tol: float) -> None:
        self.lr, self.cg_steps = lr, cg_steps
        self._stop = Stop(tol)
        self._last: _Step | None = None
        self._length, self._cuts = 1.0, 0

    def __call__(self, at: Linearization) -> Tensor:
        here = _Trial(at.point, float(at.objective), float(at.gradient_norm))
        if self._last is not None and not torch.equal(self._expected(), at.point):
            self._last, self._length = None, 1.0  # the user has set other weights
        if self._rejects(here):
            return self._shorten(here)
        if self._stop(at):
            self._last = None
            return at.point
        direction = self._direction(at)
        slope = float((direction * at.gradient).sum())
        self._last = _Step(here.point, direction, here.objective, slope, here.gradient_norm)
        # After cuts, grow back step by step: each cut costs the evaluation of a loss.
        self._length, self._cuts = min(1.0, 2.0 * self._length), 0
        trial = self._expected()
        return self._search(at, trial) if at.can_evaluate else trial

    def _expected(self) -> Tensor:
        assert self._last is not None
        return self._last.point + self._length * self._last.direction

    def _search(self, at: Linearization, trial: Tensor) -> Tensor:
        """Backtrack from ``trial`` now, since the objective can be computed there."""
        for _ in range(_MOST_CUTS):
            objective, gradient = at.evaluate(trial)
            there = _Trial(trial, float(objective), float(gradient.norm()))
            del gradient  # before there are two
            if not self._rejects(there):
                break
            trial = self._shorten(there)
            del there
        return trial

    def _direction(self, at: Linearization) -> Tensor:
        """Inexact Newton: the nearer the minimum, the smaller the residual asked for."""
        progress = self._stop.progress(at)
        tol = min(_FORCING, max(progress, 0.5 * self._stop.floor(at) / progress))
        direction = conjugate_gradient(at.hvp, -at.gradient, self.cg_steps, tol).solution
        if float((direction * at.gradient).sum()) < 0:
            return direction
        return -self.lr * at.gradient

    def _rejects(self, now: _Trial) -> bool:
        if self._last is None or self._cuts >= _MOST_CUTS:
            return False
        last = self._last
        if not math.isfinite(now.objective):
            return True
        eps = torch.finfo(now.point.dtype).eps
        rounding = 10 * eps * max(abs(last.objective), abs(now.objective))
        if abs(now.objective - last.objective) <= rounding:  # flat to the last digit
            return now.gradient_norm > last.gradient_norm
        return now.objective > last.objective + _ARMIJO * self._length * last.slope

    def _shorten(self, now: _Trial) -> Tensor:
        """Go back to the minimum of the parabola through the two values and the slope."""
        assert self._last is not None
        last = self._last
        expected = last.slope * self._length
        excess = now.objective - last.objective - expected
        cut = -expected / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.1
        self._length *= min(0.5, max(0.1, cut))
        self._cuts += 1
        return self._expected()
