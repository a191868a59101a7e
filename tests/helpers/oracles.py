"""What the package is measured against; nothing here imports it.

An inner or outer objective is a function ``f(phi, *theta) -> scalar`` of one vector ``phi`` of
shape ``[n]`` and of theta's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

Objective = Callable[..., Tensor]


def minimize(inner: Objective, start: Tensor, theta: Sequence[Tensor], lr: float) -> Tensor:
    """The inner minimum in whose basin gradient descent ends, to rounding by dense Newton."""
    fixed = [t.detach() for t in theta]
    phi, slope, curvature = start.detach(), grad(inner), hessian(inner)
    for _ in range(300):
        phi = phi - lr * slope(phi, *fixed)
    best, smallest = phi, float(slope(phi, *fixed).norm())
    for _ in range(20):
        phi = phi - torch.linalg.solve(curvature(phi, *fixed), slope(phi, *fixed))
        norm = float(slope(phi, *fixed).norm())
        if norm >= smallest:
            break
        best, smallest = phi, norm
    assert smallest < 1e-11, f"the oracle's own inner problem is not solved: {smallest:.1e}"
    return best


def implicit(
    inner: Objective,
    outer: Objective,
    theta: Sequence[Tensor],
    phi: Tensor,
    damping: float = 0.0,
) -> list[Tensor]:
    """The implicit function theorem with dense matrices, at the solution ``phi``."""
    fixed = [t.detach() for t in theta]
    matrix = hessian(inner)(phi, *fixed) + damping * torch.eye(len(phi), dtype=phi.dtype)
    v = torch.linalg.solve(matrix, grad(outer)(phi, *fixed))
    totals = []
    for i in range(1, len(fixed) + 1):
        mixed = jacrev(grad(inner), argnums=i)(phi, *fixed)
        totals.append(grad(outer, argnums=i)(phi, *fixed) - torch.tensordot(v, mixed, dims=1))
    return totals


def unrolled(
    inner: Objective,
    outer: Objective,
    theta: Sequence[Tensor],
    start: Tensor,
    lr: float,
    steps: int,
) -> list[Tensor]:
    """Back-propagation through ``steps`` gradient steps from a constant start."""
    leaves = [t.detach().requires_grad_() for t in theta]
    phi = start.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(inner(phi, *leaves), phi, create_graph=True)
        phi = phi - lr * slope
    gradients = torch.autograd.grad(outer(phi, *leaves), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def finite_difference(
    inner: Objective,
    outer: Objective,
    theta: Sequence[Tensor],
    direction: Sequence[Tensor],
    phi: Tensor,
    size: float = 1e-4,
) -> float:
    """The outer objective's slope along ``direction``, inner minima solved to rounding.

    Central differences of fourth order: their error is of the order of ``size**4``.
    """

    def value(shift: float) -> float:
        moved = [t.detach() + shift * d for t, d in zip(theta, direction, strict=True)]
        return float(outer(polish(inner, phi, moved), *moved))

    near, far = value(size) - value(-size), value(2 * size) - value(-2 * size)
    return (8 * near - far) / (12 * size)


def polish(inner: Objective, phi: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """The minimum next to ``phi``, by dense Newton."""
    theta = [t.detach() for t in theta]
    for _ in range(6):
        phi = phi - torch.linalg.solve(hessian(inner)(phi, *theta), grad(inner)(phi, *theta))
    return phi


def ridge(
    x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor, l2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ridge regression by hand: the query loss's derivatives in support features, query features
    and ``l2``, and the solution.

    Inner: ``1/2 ||X W' - Y||^2 + l2/2 ||W||^2``; outer: ``1/2 ||Xq W' - Yq||^2``.
    """
    system = x.t() @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(system, x.t() @ y).t()
    b = (x_query @ w.t() - y_query).t() @ x_query
    v = torch.linalg.solve(system, b.t()).t()
    support = -((x @ w.t() - y) @ v + (x @ v.t()) @ w)
    return support, (x_query @ w.t() - y_query) @ w, -(v * w).sum(), w


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what was expected, all tensors as one vector."""
    pairs = list(zip(got, expected, strict=True))
    difference = torch.cat([(g.detach() - e.detach()).reshape(-1) for g, e in pairs])
    return float(difference.norm() / torch.cat([e.detach().reshape(-1) for _, e in pairs]).norm())


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


def peak_of_live_tensors(run: Callable[[], object]) -> int:
    """Bytes of tensor storage that ``run`` holds at its worst moment, on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
