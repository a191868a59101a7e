"""Whether Hessian products are what the gradient's change says: autograd's may be wrong or missing.

An operation without a second derivative, one whose second derivative is wrong, a state that moves
with every pass, other data at every call: each leaves a gradient that is right and products that
are not. A difference of two gradients sees all of them, once for each learner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit.inner_problem.boundary import has_kinks
from l2l_implicit.inner_problem.linearization import AutogradLinearization, Evaluate

_TOL, _FLAT = 0.02, 1e3


def products_agree(at: AutogradLinearization, evaluate: Evaluate) -> bool | None:
    """Whether a product is the gradient's derivative along one direction, by central differences.

    Args:
        at: the linearization, T = 1.
        evaluate: objective and gradient at other points.

    Returns:
        None where two step sizes disagree: the gradient has kinks or noise there.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(at.point.shape[1], generator=generator, device="cpu").to(at.point).unsqueeze(0)
    eps = torch.finfo(at.point.dtype).eps
    size = eps ** (1 / 3) * float(at.point.square().mean().sqrt().clamp_min(1e-3))

    def difference(step: float) -> Tensor:
        up, down = (evaluate(at.point + sign * step * direction)[1] for sign in (1.0, -1.0))
        return (up - down) / (2.0 * step)

    wide, narrow = difference(2.0 * size), difference(size)
    product, scale = at.hvp(direction), float(narrow.norm())
    rounding = eps * float(at.gradient_norm) / size
    if not float((wide - narrow).norm()) <= 0.5 * _TOL * scale + _FLAT * rounding:
        return None
    return bool((product - narrow).norm() <= _TOL * scale + _FLAT * rounding)


class StepTaken(NamedTuple):
    """A step of loss tensors: where from and to, and the gradient and product with it there."""

    point: Tensor
    to: Tensor
    gradient: Tensor
    product: Tensor

    @classmethod
    def of(cls, at: AutogradLinearization, to: Tensor) -> StepTaken:
        """The step from ``at`` to the point ``to``."""
        return cls(at.point, to, at.gradient, at.hvp(to - at.point))

    def agrees(self, at: AutogradLinearization) -> bool | None:
        """Whether the gradient has changed as the products at both ends say; None: no telling.

        Their mean is right to third order in the step. What is not explained by it, nor by the
        difference of the two, is no second derivative.
        """
        if not torch.equal(self.to, at.point) or has_kinks(at.loss):
            return None
        change, product = at.gradient - self.gradient, at.hvp(self.to - self.point)
        least = _FLAT * torch.finfo(change.dtype).eps
        if not bool(change.norm() > least * self.gradient.norm()):
            return None
        missing = float((change - 0.5 * (self.product + product)).norm() / change.norm())
        if missing <= _TOL:
            return True
        explained = float((product - self.product).norm() / change.norm())
        return False if missing > explained else None
