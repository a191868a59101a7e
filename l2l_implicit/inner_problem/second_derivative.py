"""Whether Hessian products are what the gradient's change says: autograd's may be wrong or missing.

An operation without a second derivative, one whose second derivative is wrong, a state that moves
with every pass, other data at every call: each leaves a gradient that is right and products that
are not. A difference of two gradients sees all of them, once for each learner.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from l2l_implicit.inner_problem.linearization import AutogradLinearization, Evaluate

_TOL, _CLEAR, _FLAT = 0.02, 0.1, 1e3
_KINKS = ("Relu", "Threshold", "MaxPool", "Abs", "Clamp", "Hardt", "Prelu", "Maximum", "Minimum")


def moves_with_each_pass(module: nn.Module) -> bool:
    """Whether a module is spectral norm in training mode, whose every pass is another function."""
    for part in module.modules():
        hooks = any(isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values())
        if part.training and (hooks or type(part).__name__ == "_SpectralNorm"):
            return True
    return False


def products_agree(at: AutogradLinearization, evaluate: Evaluate) -> bool | None:
    """Whether a product is the gradient's derivative along one direction, by central differences.

    Args:
        at: the linearization, T = 1.
        evaluate: objective and gradient at other points.

    Returns:
        None where two step sizes disagree: the gradient has kinks or noise there.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(at.point.shape, generator=generator, device="cpu").to(at.point)
    eps = torch.finfo(at.point.dtype).eps
    size = eps ** (1 / 3) * float(at.point.square().mean().sqrt().clamp_min(1e-3))

    def difference(step: float) -> Tensor:
        up, down = (evaluate(at.point + sign * step * direction)[1] for sign in (1.0, -1.0))
        return (up - down) / (2.0 * step)

    wide, narrow = difference(2.0 * size), difference(size)
    product, scale = at.derivative(direction), float(narrow.norm())
    rounding = eps * float(at.gradient_norm) / size
    if not float((wide - narrow).norm()) <= 0.5 * _TOL * scale + _FLAT * rounding:
        return None
    return bool((product - narrow).norm() <= _TOL * scale + _FLAT * rounding)


class StepTaken(NamedTuple):
    """A step of loss tensors: where from, the norm of where to, gradient and product with it there.

    The next loss is at its end, unless the user has moved the weights: then the norm is another.
    """

    point: Tensor
    length: Tensor
    gradient: Tensor
    product: Tensor

    @classmethod
    def of(cls, at: AutogradLinearization, to: Tensor) -> StepTaken:
        """The step from ``at`` to the point ``to``."""
        return cls(at.point, to.norm(), at.gradient, at.derivative(to - at.point))

    def agrees(self, at: AutogradLinearization, before: float) -> tuple[bool | None, float]:
        """Whether the gradient has changed as the products at both ends say; None: no telling.

        Their mean is right to third order in the step: what it misses vanishes as the steps get
        short, where the second derivative is one, and stays where it is none. So a miss counts that
        the difference of the products does not explain, on a step that is clearly short or if it
        is no smaller than the miss of the step before.

        Args:
            at: the linearization where the step has led to.
            before: what was missing at the step before, relative; infinity for nothing known.

        Returns:
            The verdict, and what is missing at this step.
        """
        kinks = (kink in name for name in at.operations for kink in _KINKS)
        if not torch.equal(self.length, at.point.norm()) or any(kinks):  # which finite steps cross
            return None, math.inf
        step, eps = at.point - self.point, torch.finfo(at.point.dtype).eps
        moved, product = float(step.norm()) > eps**0.5 * float(self.length), at.derivative(step)
        del step  # before there is another vector
        change = at.gradient - self.gradient
        size, norm = float(change.norm()), float(self.gradient.norm())
        rounding = eps * max(norm, float(at.regularizer_norm()))
        if not size > _FLAT * rounding or not moved:
            return None, math.inf
        missing = float((change - 0.5 * (self.product + product)).norm()) / size
        if missing <= _TOL:
            return True, missing
        explained = float((product - self.product).norm()) / size
        beyond_minimum = size > 1.2 * max(norm, float(at.gradient_norm))
        if missing <= explained or beyond_minimum:
            return None, math.inf
        short = size <= 0.3 * norm and missing > max(_CLEAR, 3.0 * explained)
        return (False if short or missing > 0.7 * before else None), missing
