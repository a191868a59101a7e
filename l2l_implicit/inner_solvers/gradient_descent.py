"""Steps of the inner solver: from a linearization of the inner objective to the next phi.

The hypergradient does not care how the inner minimum was found, only that it was. Here: what a step
is, and gradient descent; `newton` and `lbfgs`, beside this file, hold the other two.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.linear_solvers.curvature import largest_curvature


class InnerStep(Protocol):
    """Proposes phi, shape ``[n]``, from the linearization at the present one; may keep state.

    One that returns ``at.point`` itself says that there is nothing left to do. One that has an
    attribute ``needs_hvp`` equal to False is given linearizations without products.
    """

    def __call__(self, at: Linearization) -> Tensor: ...


class Stop:
    """Says when the inner gradient is small enough.

    Args:
        tol: its norm relative to its largest so far, or None for never.
    """

    def __init__(self, tol: float | None) -> None:
        self._tol, self._largest = tol, 0.0

    def __call__(self, at: Linearization) -> bool:
        self._largest = max(self._largest, at.gradient_norm)
        return self._tol is not None and self.progress(at) <= self.floor(at)

    def floor(self, at: Linearization) -> float:
        """The tolerance, no smaller than what the dtype can show."""
        return max(self._tol or 0.0, 10 * torch.finfo(at.point.dtype).eps)

    def progress(self, at: Linearization) -> float:
        """The gradient's norm relative to its largest; 0 for a start without a gradient."""
        return at.gradient_norm / self._largest if self._largest > 0.0 else 0.0


class GradientStep:
    r"""Gradient descent, :math:`\phi - \lambda_\phi \nabla_\phi g`: Algorithm 1, line 8.

    Args:
        lr: :math:`\lambda_\phi`, or ``'auto'``: 1 over the largest curvature, estimated at the
            first step and again wherever the objective has risen since.
        tol: the gradient's norm, relative to its first, at which phi is left where it is; None:
            never, as the papers prescribe.
    """

    def __init__(self, lr: float | str, tol: float | None = None) -> None:
        self._auto = lr == "auto"
        self.lr = math.nan if self._auto else float(lr)
        self.needs_hvp = self._auto
        self._stop = Stop(tol)
        self._objective = math.inf

    def __call__(self, at: Linearization) -> Tensor:
        if self._stop(at):
            return at.point
        if self._auto:
            self._measure(at)
        return at.point - self.lr * at.gradient

    def _measure(self, at: Linearization) -> None:
        """Keep the step size if there is one and the objective has not risen with it."""
        objective = at.objective
        rounding = 10 * torch.finfo(at.point.dtype).eps * abs(objective)
        rose, self._objective = objective > self._objective + rounding, objective
        if rose or math.isnan(self.lr):
            largest = largest_curvature(at.hvp, at.point)
            if not 0.0 < largest < math.inf:
                raise FloatingPointError(
                    f"lr='auto': expected a finite curvature above 0, got {largest}; look for nan "
                    "in the data, set l2 above 0, or give lr as a number"
                )
            # On a rise never longer than before: the curvature is that of one point.
            self.lr = min(1.0 / largest, 0.5 * self.lr if rose else math.inf)
