"""Small dense oracles in float64, for problems that `oracles.minimize` cannot solve.

An objective is ``f(phi, theta) -> scalar`` of two vectors; a field is ``g(phi, theta) -> [n]``,
the gradient that an inner solver is shown, which need not be the derivative of anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

Function = Callable[[Tensor, Tensor], Tensor]


def solve(objective: Callable[[Tensor], Tensor], phi: Tensor, steps: int = 200) -> Tensor:
    """A minimum: Newton with a dense Hessian, made positive, and a line search."""
    for _ in range(steps):
        slope, (values, basis) = grad(objective)(phi), torch.linalg.eigh(hessian(objective)(phi))
        sizes = values.abs().clamp_min(1e-13 * float(values.abs().max()))
        step = -basis @ ((basis.t() @ slope) / sizes)
        size, here = 1.0, float(objective(phi))
        while float(objective(phi + size * step)) > here and size > 1e-12:
            size /= 2
        if size <= 1e-12:
            break
        phi = phi + size * step
        if float(step.norm()) <= 1e-14 * float(1 + phi.norm()):
            break
    return phi


def root(field: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
    """The zero to which short steps against the field lead, the last ones by dense Newton."""
    here = field(phi)
    for turn in range(3000):
        if turn % 20 == 0:
            newton = phi - torch.linalg.solve(jacrev(field)(phi), here)
            if float(field(newton).norm()) < 0.1 * float(here.norm()):
                break
        phi = phi - 0.05 * here
        here = field(phi)
    for _ in range(30):
        step = torch.linalg.solve(jacrev(field)(phi), here)
        phi = phi - step
        here = field(phi)
        if float(step.norm()) <= 1e-12 * float(1 + phi.norm()):
            return phi
    raise AssertionError(f"the oracle's own field has no zero: {float(here.norm()):.1e}")


def response(field: Function, outer: Function, phi: Tensor, theta: Tensor) -> Tensor:
    """The derivative of ``outer(phi(theta), theta)`` where ``phi`` is a zero of the field."""
    return response_at(field, outer, root(lambda p: field(p, theta), phi), theta)


def response_at(field: Function, outer: Function, phi: Tensor, theta: Tensor) -> Tensor:
    jacobian = jacrev(field, argnums=0)(phi, theta)
    v = torch.linalg.solve(jacobian.t(), grad(outer, argnums=0)(phi, theta))
    return grad(outer, argnums=1)(phi, theta) - jacrev(field, argnums=1)(phi, theta).t() @ v


def implicit(inner: Function, outer: Function, phi: Tensor, theta: Tensor) -> Tensor:
    """The same for the minimum of ``inner`` next to ``phi``."""
    phi = solve(lambda p: inner(p, theta), phi)
    return response_at(grad(inner, argnums=0), outer, phi, theta)


def linear(phi: Tensor, x: Tensor, ways: int) -> Tensor:
    """A linear layer whose weight and bias are one vector: ``[m, d] -> [m, ways]``."""
    d = x.shape[1]
    return x @ phi[: ways * d].view(ways, d).t() + phi[ways * d :]


Bend = Callable[[Tensor], Tensor]


def network(phi: Tensor, x: Tensor, hidden: int, ways: int, bend: Bend) -> Tensor:
    """Two layers with ``bend`` between, their parameters one vector in torch's order."""
    first = hidden * (x.shape[1] + 1)
    return linear(phi[first:], bend(linear(phi[:first], x, hidden)), ways)


Rounded = Callable[[Tensor, Tensor, float], Tensor]


def slope_along(
    inner: Rounded, outer: Rounded, phi: Tensor, theta: Tensor, direction: Tensor,
    widths: tuple[float, ...] = (0.1, 0.03, 1e-2, 3e-3, 1e-3, 3e-4),
) -> Tensor:
    """The outer loss's slope where the inner minimum lies on a kink, shape ``[1]``.

    By central differences, of minima of an inner objective whose kinks are rounded within ever
    smaller widths, its last argument.
    """
    last = widths[-1]
    for width in widths:
        phi = solve(lambda p, width=width: inner(p, theta, width), phi)
    ends = []
    for size in (1e-6, -1e-6):
        moved = theta + size * direction
        ends.append(outer(solve(lambda p, moved=moved: inner(p, moved, last), phi), moved, last))
    return ((ends[0] - ends[1]) / 2e-6).reshape(1)
