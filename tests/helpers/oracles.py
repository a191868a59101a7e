"""What the package is measured against, in float64 with dense matrices; nothing here imports it.

An inner or outer objective is ``f(phi, *theta) -> scalar`` of one vector ``phi`` of shape ``[n]``
and of theta's tensors; a field is ``g(phi, *theta) -> [n]``, the gradient that an inner solver is
shown, which need not be the derivative of anything.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

Objective = Callable[..., Tensor]
Tensors = Sequence[Tensor]


# Minima and zeros.


def solve(objective: Objective, phi: Tensor, steps: int = 200) -> Tensor:
    """A minimum: Newton with a dense Hessian, made positive, and a line search.

    Where the objective is flat to its last digit, the gradient tells better from worse.
    """

    def better(one: Tensor, other: Tensor) -> bool:
        gain = float(objective(other) - objective(one))
        flat = abs(gain) <= 1e-13 * (1 + abs(float(objective(other))))
        return gain > 0 and not flat or flat and bool(slope(one).norm() < slope(other).norm())

    slope = grad(objective)
    for _ in range(steps):
        values, basis = torch.linalg.eigh(hessian(objective)(phi))
        sizes = values.abs().clamp_min(1e-13 * float(values.abs().max()))
        step, size = -basis @ ((basis.t() @ slope(phi)) / sizes), 1.0
        least = max(1e-12, 1e-15 * float((1 + phi.norm()) / step.norm().clamp_min(1e-300)))
        while size > least and not better(phi + size * step, phi):
            size /= 2
        if size <= least:
            break
        phi = phi + size * step
    return phi


def minimize(inner: Objective, start: Tensor, theta: Tensors, lr: float) -> Tensor:
    """The inner minimum in whose basin gradient descent ends, to rounding."""
    fixed = [t.detach() for t in theta]
    phi, slope = start.detach(), grad(inner)
    for _ in range(300):
        phi = phi - lr * slope(phi, *fixed)
    return polish(inner, phi, theta)


def polish(inner: Objective, phi: Tensor, theta: Tensors) -> Tensor:
    """The minimum next to ``phi``."""
    fixed = [t.detach() for t in theta]
    phi = solve(lambda p: inner(p, *fixed), phi)
    left = float(grad(inner)(phi, *fixed).norm())
    assert left < 1e-11, f"the oracle's own inner problem is not solved: {left:.1e}"
    return phi


def root(field: Objective, phi: Tensor) -> Tensor:
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


# Hypergradients.


def response_at(
    field: Objective, outer: Objective, theta: Tensors, phi: Tensor, damping: float = 0.0
) -> list[Tensor]:
    """The implicit function theorem: the derivatives of ``outer(phi(theta), *theta)`` where
    ``phi`` is a zero of the field."""
    fixed = [t.detach() for t in theta]
    matrix = jacrev(field)(phi, *fixed) + damping * torch.eye(len(phi), dtype=phi.dtype)
    v = torch.linalg.solve(matrix.t(), grad(outer)(phi, *fixed))
    totals = []
    for i in range(1, len(fixed) + 1):
        mixed = jacrev(field, argnums=i)(phi, *fixed)
        totals.append(grad(outer, argnums=i)(phi, *fixed) - torch.tensordot(v, mixed, dims=1))
    return totals


def response(field: Objective, outer: Objective, phi: Tensor, theta: Tensor) -> Tensor:
    """The same for one vector ``theta``, and the zero that is reached from ``phi``."""
    return response_at(field, outer, [theta], root(lambda p: field(p, theta), phi))[0]


def implicit(
    inner: Objective, outer: Objective, theta: Tensors, phi: Tensor, damping: float = 0.0
) -> list[Tensor]:
    """The same for the gradient of an inner objective, at its minimum ``phi``."""
    return response_at(grad(inner), outer, theta, phi, damping)


def implicit_from(inner: Objective, outer: Objective, phi: Tensor, theta: Tensor) -> Tensor:
    """The same for one vector ``theta``, and the minimum next to ``phi``."""
    return implicit(inner, outer, [theta], solve(lambda p: inner(p, theta), phi))[0]


def unrolled(
    inner: Objective, outer: Objective, theta: Tensors, start: Tensor, lr: float, steps: int
) -> list[Tensor]:
    """Back-propagation through ``steps`` gradient steps from a constant start."""
    leaves = [t.detach().requires_grad_() for t in theta]
    phi = start.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(inner(phi, *leaves), phi, create_graph=True)
        phi = phi - lr * slope
    gradients = torch.autograd.grad(outer(phi, *leaves), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def slope_at_zero(value: Callable[[float], Any], size: float) -> Any:
    """The derivative of ``value`` at 0 by central differences: an error of ``size**4``."""
    near, far = value(size) - value(-size), value(2 * size) - value(-2 * size)
    return (8 * near - far) / (12 * size)


def finite_difference(
    inner: Objective, outer: Objective, theta: Tensors, direction: Tensors, phi: Tensor
) -> float:
    """The outer objective's slope along ``direction``, inner minima solved to rounding."""

    def value(shift: float) -> float:
        moved = [t.detach() + shift * d for t, d in zip(theta, direction, strict=True)]
        return float(outer(polish(inner, phi, moved), *moved))

    return slope_at_zero(value, 1e-4)


def slope_along(
    inner: Objective, outer: Objective, phi: Tensor, theta: Tensor, direction: Tensor,
    widths: tuple[float, ...] = (0.1, 0.03, 1e-2, 3e-3, 1e-3, 3e-4),
) -> Tensor:  # fmt: skip
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


# Networks as functions of one vector.


def linear(phi: Tensor, x: Tensor, ways: int) -> Tensor:
    """A linear layer whose weight and bias are one vector: ``[m, d] -> [m, ways]``."""
    d = x.shape[1]
    return x @ phi[: ways * d].view(ways, d).t() + phi[ways * d :]


def network(
    phi: Tensor, x: Tensor, hidden: int, ways: int, bend: Callable[[Tensor], Tensor]
) -> Tensor:
    """Two layers with ``bend`` between, their parameters one vector in torch's order."""
    first = hidden * (x.shape[1] + 1)
    return linear(phi[first:], bend(linear(phi[:first], x, hidden)), ways)


# Comparisons and measures.


def flat(tensors: Any) -> Tensor:
    """All of them as one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def relative_error(got: Tensors, expected: Tensors) -> float:
    """Norm of the difference over the norm of what was expected, all tensors as one vector."""
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape or g.numel() == e.numel() == 1, (g.shape, e.shape)
    return float((flat(got) - flat(expected)).norm() / flat(expected).norm())


def spd(n: int, condition: float = 100.0) -> Tensor:
    """A random symmetric matrix with eigenvalues from 1 to ``condition``, evenly in the log."""
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n)) @ q.t()


def rows(a: Tensor) -> Callable[[Tensor], Tensor]:
    """Products of rows ``[T, n]`` with a symmetric matrix ``[n, n]``, or with one a row."""
    return (lambda p: p @ a) if a.dim() == 2 else lambda p: torch.einsum("tij,tj->ti", a, p)


def subroutine_1(
    matvec: Callable[[Tensor], Tensor], b: Tensor, steps: int, v: Tensor | None = None
) -> Tensor:
    """Subroutine 1 of Yang et al. (2025), line by line, no guards."""
    v = torch.zeros_like(b) if v is None else v
    r = p = b - matvec(v)
    for _ in range(steps):
        h = matvec(p)
        eta = (r @ r) / (p @ h)
        v = v + eta * p
        r_next = r - eta * h
        zeta = (r_next @ r_next) / (r @ r)
        p = r_next + zeta * p
        r = r_next
    return v


class _Counted(TorchDispatchMode):
    """torch 2.2's profiler loses some."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(run: Callable[[], object]) -> int:
    """How many of torch's operations ``run`` calls."""
    with _Counted() as operations:
        run()
    return operations.count


def peak_of_live_tensors(run: Callable[[], object]) -> int:
    """Bytes of tensor storage that ``run`` holds at its worst moment, on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    began = "start_ns" if hasattr(events[0], "start_ns") else "start_us"  # torch 2.2
    live = peak = 0
    for event in sorted(events, key=lambda e: getattr(e, began)()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
