"""Whether Hessian products are what the gradient's change says: autograd's may be wrong or missing.

An operation without a second derivative, one whose second derivative is wrong, a state that moves
with every pass, other data at every call: each leaves a gradient that is right and products that
are not. A difference of two gradients sees all of them, once for each learner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from l2l_implicit.inner_problem.linearization import AutogradLinearization, flat

_TOL, _CLEAR, _FLAT = 0.02, 0.1, 1e3
_KINKS = ("Relu", "Threshold", "MaxPool", "Abs", "Clamp", "Hardt", "Prelu", "Maximum", "Minimum")


def moves_with_each_pass(module: nn.Module) -> bool:
    """Whether a module is spectral norm in training mode, whose every pass is another function."""
    for part in module.modules():
        hooks = any(isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values())
        if part.training and (hooks or type(part).__name__ == "_SpectralNorm"):
            return True
    return False


def products_agree(
    at: AutogradLinearization, evaluate: Callable[[Tensor], list[Tensor]]
) -> bool | None:
    """Whether products are the gradients' derivatives along one direction, by central differences.

    Args:
        at: the linearization, T = 1.
        evaluate: the gradients in phi and, as in `in_theta`, in theta at other points.

    Returns:
        None where two step sizes disagree: the gradient has kinks or noise there.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(at.point.shape, generator=generator, device="cpu").to(at.point)
    direction *= at.loss_gradient != 0  # what is masked, as a padding's row, is to stay
    eps = torch.finfo(at.point.dtype).eps
    size = eps ** (1 / 3) * float(at.point.square().mean().sqrt().clamp_min(1e-3))

    def differences(step: float) -> list[Tensor]:
        ends = (evaluate(at.point + sign * step * direction) for sign in (1.0, -1.0))
        return [(up - down) / (2.0 * step) for up, down in zip(*ends, strict=True)]

    verdict: bool | None = True
    gradients = [at.gradient, *in_theta(at)]
    products = [at.derivative(direction), *in_theta(at, direction)]
    parts = gradients, differences(2.0 * size), differences(size), products
    for gradient, wide, narrow, product in zip(*parts, strict=True):
        scale, rounding = float(narrow.norm()), eps * float(gradient.norm()) / size
        if not float((wide - narrow).norm()) <= 0.5 * _TOL * scale + _FLAT * rounding:
            verdict = None
        elif not float((product - narrow).norm()) <= _TOL * scale + _FLAT * rounding:
            return False
    return verdict


def in_theta(at: AutogradLinearization, vector: Tensor | None = None) -> list[Tensor]:
    """The loss's gradient in theta, or its derivative along ``vector``; nothing without a theta."""
    parts = at.in_theta() if vector is None else at.mixed(vector)
    return [flat(parts, at.sources()[: len(parts)])] if parts else []


class StepTaken(NamedTuple):
    """A step of loss tensors: where from, the norm of where to, gradient and product with it there,
    in phi and in theta (`in_theta`).

    The next loss is at its end, unless the user has moved the weights: then the norm is another.
    """

    point: Tensor
    length: Tensor
    gradient: Tensor
    product: Tensor
    in_theta: list[Tensor]

    @classmethod
    def of(cls, at: AutogradLinearization, to: Tensor) -> StepTaken | None:
        """The step from ``at`` to the point ``to``; None where finite steps may cross kinks."""
        if any(kink in name for name in at.operations for kink in _KINKS):
            return None
        step, gradient = to - at.point, in_theta(at)
        both = gradient + in_theta(at, step)
        return cls(at.point, to.norm(), at.gradient, at.derivative(step), both)

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
        if not torch.equal(self.length, at.point.norm()):
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
            del change, product
            return self._agrees_in_theta(at), missing
        explained = float((product - self.product).norm()) / size
        beyond_minimum = size > 1.2 * max(norm, float(at.gradient_norm))
        if missing <= explained or beyond_minimum:
            return None, math.inf
        short = size <= 0.3 * norm and missing > max(_CLEAR, 3.0 * explained)
        return (False if short or missing > 0.7 * before else None), missing

    def _agrees_in_theta(self, at: AutogradLinearization) -> bool | None:
        """The same of theta's gradient, on a step that phi's has followed."""
        now = [*in_theta(at), *in_theta(at, at.point - self.point)]
        if [*map(Tensor.numel, now)] != [*map(Tensor.numel, self.in_theta)]:
            return None
        if not now:
            return True
        change, before, after = now[0] - self.in_theta[0], self.in_theta[1], now[1]
        missing, explained = (change - 0.5 * (before + after)).norm(), (after - before).norm()
        rounding = _FLAT * torch.finfo(change.dtype).eps * now[0].norm()
        if bool(missing <= _TOL * change.norm() + rounding):
            return True
        return False if bool(missing > explained) else None
