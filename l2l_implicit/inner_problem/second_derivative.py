"""Whether Hessian products are what the gradient's change says: autograd's may be wrong or missing.

An operation without a second derivative, one whose second derivative is wrong, a state that moves
with every pass, other data at every call: each leaves a gradient that is right and products that
are not. Differences of gradients in phi and theta see all of them, at first and ever more seldom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linearization import AutogradLinearization, Products, flat

_TOL, _CLEAR, _FLAT = 0.02, 0.1, 1e3
_NEAR = 1e-3  # of the steps that compare products: as near as solvers come to a kink
Evaluate = Callable[[Tensor], list[Tensor]]
_KINKS = ("Relu", "Threshold", "MaxPool", "Abs", "Clamp", "Hardt", "Prelu", "Maximum", "Minimum")

NO_SECOND = (
    "the inner gradient does not change as its second derivative says: expected an inner loss "
    "that torch can differentiate twice, the same at each call, got an operation whose second "
    "derivative is missing or wrong (a custom autograd.Function, once_differentiable, "
    "weight_norm, spectral_norm in training mode, a detached piece), or other data at each call; "
    "the hypergradient is wrong: write it out, or use linear=Perturbed() or first_order=True"
)
KINK = (
    "the inner minimum lies on a kink: expected an inner objective with a second derivative "
    "there, got one whose gradient jumps (an absolute value, a maximum, ReLU); the hypergradient "
    "is wrong: round the kink off, or use first_order=True"
)


def products_agree(at: AutogradLinearization, evaluate: Evaluate) -> bool | None:
    """Whether products are the gradients' derivatives along one direction, by central differences.

    Args:
        at: the linearization, T = 1.
        evaluate: `gradients` at other points.

    Returns:
        None where two step sizes disagree: the gradient has kinks or noise there.
    """
    (direction, size), eps = _step(at), torch.finfo(at.point.dtype).eps
    verdict: bool | None = True
    ends = (_differences(at, evaluate, factor * size * direction) for factor in (2.0, 1.0))
    parts = gradients(at), *ends, products(at, direction)
    for gradient, wide, narrow, product in zip(*parts, strict=False):
        wide, narrow = wide / (4.0 * size), narrow / (2.0 * size)
        scale, rounding = float(narrow.norm()), eps * float(gradient.norm()) / size
        same = wide.shape == narrow.shape == product.shape  # else other data at each call
        if not (same and float((wide - narrow).norm()) <= 0.5 * _TOL * scale + _FLAT * rounding):
            verdict = None
        elif not float((product - narrow).norm()) <= _TOL * scale + _FLAT * rounding:
            return False
    return verdict


def on_a_kink(at: AutogradLinearization, evaluate: Evaluate) -> bool:
    """Whether the gradient jumps at the point itself, and what is left of it is a part of the jump.

    Such a minimum stays on its kink as theta moves, which no second derivative knows. A difference
    over a step s is 2 s times the second derivative, plus the jump: of three steps, two estimates
    of it. Beside a solved problem's gradient a jump that happens to be near is many times as large.
    """
    direction, size = _step(at)
    steps = (factor * _NEAR * size * direction for factor in (4.0, 2.0, 1.0))
    wide, half, narrow = (_differences(at, evaluate, step)[0] for step in steps)
    far, near = 2.0 * half - wide, 2.0 * narrow - half
    jump, left = float(near.norm()), float(at.gradient.norm())
    rounding = torch.finfo(at.point.dtype).eps * max(left, float(at.regularizer_norm()))
    there = jump > _FLAT * rounding and float((far - near).norm()) <= _CLEAR * jump
    return there and left > _NEAR * jump


def _differences(at: AutogradLinearization, evaluate: Evaluate, step: Tensor) -> list[Tensor]:
    """Of the gradients at both ends of two steps from the point, where they have one shape."""
    pairs = zip(evaluate(at.point + step), evaluate(at.point - step), strict=False)
    return [up - down for up, down in pairs if up.shape == down.shape]


def _step(at: AutogradLinearization) -> tuple[Tensor, float]:
    """A random direction, and how far to go for a central difference."""
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(at.point.shape, generator=generator, device="cpu").to(at.point)
    direction *= at.loss_gradient != 0  # what is masked, as a padding's row, is to stay
    third = torch.finfo(at.point.dtype).eps ** (1 / 3)
    return direction, third * float(at.point.square().mean().sqrt().clamp_min(1e-3))


def gradients(at: AutogradLinearization) -> list[Tensor]:
    """The objective's in phi, and the loss's in theta where there is one, as vectors."""
    return [at.gradient, *_vector(at, at.in_theta())]


def products(at: AutogradLinearization, vector: Tensor) -> list[Tensor]:
    """The derivatives of `gradients` along ``vector``."""
    return [at.derivative(vector), *_vector(at, at.mixed(vector))]


def _vector(at: AutogradLinearization, parts: Products) -> list[Tensor]:
    dense = [part if part is None else part.to_dense() for part in parts]
    return [flat(dense, at.sources()[: len(parts)])] if parts else []


class StepTaken(NamedTuple):
    """A step of loss tensors: where from, the norm of where to, gradients and products there.

    The next loss is at its end, unless the user has moved the weights: then the norm is another.
    """

    point: Tensor
    length: Tensor
    gradients: list[Tensor]
    products: list[Tensor]

    @classmethod
    def of(cls, at: AutogradLinearization, to: Tensor) -> StepTaken | None:
        """The step from ``at`` to the point ``to``; None where finite steps may cross kinks."""
        if any(kink in name for name in at.operations for kink in _KINKS):
            return None
        return cls(at.point, to.norm(), gradients(at), products(at, to - at.point))

    def agrees(self, at: AutogradLinearization, before: float) -> tuple[bool | None, float]:
        """Whether the gradients have changed as the products at both ends say; None: no telling.

        Their mean is right to third order in the step: what it misses vanishes as the steps get
        short, where the second derivative is one, and stays where it is none. So a miss counts that
        the difference of the products does not explain, on a step that is clearly short or if it
        is no smaller than the miss ``before`` (relative, of the step before; infinity for none).

        Returns:
            The verdict, and what is missing at this step, which has led to ``at``.
        """
        step, eps = at.point - self.point, torch.finfo(at.point.dtype).eps
        moved = float(step.norm()) > eps**0.5 * float(self.length)
        if not moved or not torch.equal(self.length, at.point.norm()):
            return None, math.inf
        ends = self.gradients, gradients(at), self.products, products(at, step)
        del step
        verdict: bool | None = True
        worst, floor = 0.0, float(at.regularizer_norm())
        for old, new, product, last in zip(*ends, strict=False):
            if old.shape != new.shape:  # other data
                return None, math.inf
            norm, size = float(old.norm()), float((new - old).norm())
            if not size > _FLAT * eps * max(norm, floor):
                if old is self.gradients[0]:
                    return None, math.inf
                continue  # theta's need not change
            missing = float((new - old - 0.5 * (product + last)).norm()) / size
            worst = max(worst, missing)
            if missing <= _TOL:
                continue
            explained = float((last - product).norm()) / size
            beyond_minimum = size > 1.2 * max(norm, float(new.norm()))
            if missing <= explained or beyond_minimum:
                return None, math.inf
            short = size <= 0.3 * norm and missing > max(_CLEAR, 3.0 * explained)
            if short or missing > 0.7 * before:
                return False, missing
            verdict = None
        return verdict, worst
