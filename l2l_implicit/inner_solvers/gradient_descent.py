"""Gradient descent, the papers' inner solver."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.protocol import Stop
from l2l_implicit.linear_solvers.curvature import largest_curvature


@dataclass(frozen=True)
class GradientDescent:
    r"""Steps :math:`\phi - \lambda_\phi \nabla_\phi g`: Yang et al. (2025), Algorithm 1, line 8.

    One ``adapt(loss)`` is one step; ``adapt(closure, steps=K)`` is K of them. K steps rarely solve
    the problem, and the learner says so.

    Args:
        adaptive: instead of the learner's ``lr``, 1 over the largest curvature, estimated where the
            task starts and again wherever the objective has risen since.
        tol: the gradient's norm, relative to its largest, at which phi is left where it is; None:
            never, as the papers prescribe.

    References:
        Yang et al. (2025), Algorithm 1; Rajeswaran et al. (2019), Algorithm 2.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit import GradientDescent, ImplicitCGHead
        >>> ImplicitCGHead(nn.Linear(4, 2), lr=0.1, inner=GradientDescent()).inner
        GradientDescent(adaptive=False, tol=None)
    """

    adaptive: bool = False
    tol: float | None = None

    def __post_init__(self) -> None:
        if self.tol is not None:
            checks.positive("GradientDescent: tol", self.tol)

    def begin(self, lr: float) -> GradientStep:
        """The state of a new task."""
        return GradientStep(lr, self.adaptive, self.tol)

    def solve_heads(self, at: LinearHeads, steps: int, lr: float) -> LinearHeads | None:
        r"""K steps on the Gram matrix, whatever the number of features, at one product of
        ``[m, m]`` by ``[m, k]`` each: :math:`\phi = a + \tau (\phi^0 - a) + X^\top C` all along.
        """
        if self.adaptive or self.tol is not None:
            return None
        problem, quadratic = at.problem, at.quadratic
        gram, drift_in_phi = problem.gram(), quadratic.offset(at.point)
        outputs, drift = problem.outputs(at.point), problem.outputs(drift_in_phi)
        base = outputs - drift  # the anchor's, zero where that is
        shrink, tau, c = 1.0 - lr * quadratic.strength, 1.0, torch.zeros_like(drift)
        for _ in range(steps):
            slope = problem.loss.moved(outputs).gradient
            c, tau = torch.add(c * shrink, slope, alpha=-lr), tau * shrink
            outputs = torch.baddbmm(torch.add(base, drift, alpha=tau), gram, c)
        point = problem.in_phi(c).add_(drift_in_phi, alpha=tau)
        return at.moved(point if quadratic.center is None else point + quadratic.center)


class GradientStep:
    """The state of `GradientDescent`; for T tasks as for one, but with a tolerance T = 1."""

    def __init__(self, lr: float, adaptive: bool, tol: float | None) -> None:
        self.lr, self.needs_hvp = math.nan if adaptive else lr, adaptive
        self._stop = None if tol is None else Stop(tol)
        self._objective = math.inf

    def __call__(self, at: Linearization) -> Tensor:
        if self._stop is not None and self._stop(at):
            return at.point
        if self.needs_hvp:
            self._measure(at)
        return at.point - self.lr * at.gradient

    def _measure(self, at: Linearization) -> None:
        """Keep the step size if there is one and the objective has not risen with it."""
        objective = float(at.objective)
        rounding = 10 * torch.finfo(at.point.dtype).eps * abs(objective)
        rose, self._objective = objective > self._objective + rounding, objective
        if rose or math.isnan(self.lr):
            largest = float(largest_curvature(at.hvp, at.point))
            if not 0.0 < largest < math.inf:
                raise FloatingPointError(
                    "GradientDescent(adaptive=True): expected a finite curvature above 0, got "
                    f"{largest}; look for nan in the data, set l2 above 0, or give lr as a number"
                )
            # On a rise never longer than before: the curvature is that of one point.
            self.lr = min(1.0 / largest, 0.5 * self.lr if rose else math.inf)
