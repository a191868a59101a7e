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

    Any other module takes one Newton-CG step for each ``adapt(loss)``, or step of a closure. If the
    objective does not fall by the Armijo rule, the step is taken back in part: at once with a
    closure, and with a loss tensor at the next, before a new direction is tried. Conjugate gradient
    ends where it meets a direction of negative curvature, and what it has by then is the step;
    where that is zero (the gradient itself is such a direction), it is ``-lr`` times the gradient.

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
        step, here, count = NewtonStep(lr, cg_steps=500, tol=1e-10), at.task(t), 0
        while count < 100 and (point := step(here)) is not here.point:
            here, count = here.moved(point), count + 1
        points.append(here.point)
        steps.append(count)
    there = at.moved(torch.cat(points))
    there.solved, there.steps = True, steps
    return there


class _Step(NamedTuple):
    """Where a step began, the whole of it, and the objective, its slope and gradient there."""

    point: Tensor
    direction: Tensor
    objective: float
    slope: float
    gradient_norm: float


class NewtonStep:
    """The state of `Newton` for one task, T = 1."""

    needs_hvp = True

    def __init__(self, lr: float, cg_steps: int, tol: float) -> None:
        self.lr, self.cg_steps, self._stop = lr, cg_steps, Stop(tol)
        self._last: _Step | None = None
        self._length, self._cuts = 1.0, 0

    def __call__(self, at: Linearization) -> Tensor:
        objective, norm = float(at.objective), float(at.gradient_norm)
        if self._last is not None and not torch.equal(self._expected(), at.point):
            self._last, self._length = None, 1.0  # the user has set other weights
        if self._rejects(objective, norm):
            return self._shorten(objective)
        if self._stop(at):
            self._last = None
            return at.point
        # Inexact: the nearer the minimum, the smaller the residual asked for.
        progress = self._stop.progress(at)
        tol = min(_FORCING, max(progress, 0.5 * self._stop.floor(at) / progress))
        direction = conjugate_gradient(at.hvp, -at.gradient, self.cg_steps, tol).solution
        slope = float((direction * at.gradient).sum())
        if not slope < 0:
            direction = -self.lr * at.gradient
            slope = float((direction * at.gradient).sum())
        self._last = _Step(at.point, direction, objective, slope, norm)
        # After cuts, grow back step by step: each cut costs the evaluation of a loss.
        self._length, self._cuts = min(1.0, 2.0 * self._length), 0
        trial = self._expected()
        while at.elsewhere and self._cuts < _MOST_CUTS:  # search now
            there, gradient = at.evaluate(trial)
            rejected = self._rejects(float(there), float(gradient.norm()))
            del gradient  # before there are two
            if not rejected:
                break
            trial = self._shorten(float(there))
        return trial

    def _expected(self) -> Tensor:
        assert self._last is not None
        return self._last.point + self._length * self._last.direction

    def _rejects(self, objective: float, gradient_norm: float) -> bool:
        """Whether the last step, of the present length, has led to too high an objective."""
        last = self._last
        if last is None or self._cuts >= _MOST_CUTS:
            return False
        if not math.isfinite(objective):
            return True
        eps = torch.finfo(last.point.dtype).eps
        rounding = 10 * eps * max(abs(last.objective), abs(objective))
        if abs(objective - last.objective) <= rounding:  # flat to the last digit
            return gradient_norm > last.gradient_norm
        return objective > last.objective + _ARMIJO * self._length * last.slope

    def _shorten(self, objective: float) -> Tensor:
        """Go back to the minimum of the parabola through the two values and the slope."""
        assert self._last is not None
        expected = self._last.slope * self._length
        excess = objective - self._last.objective - expected
        cut = -expected / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.1
        self._length *= min(0.5, max(0.1, cut))
        self._cuts += 1
        return self._expected()
