"""A linear head's regularised inner problem in extended precision, and solves with its Hessian.

Right-hand sides and solutions are of shape ``[d, k]``, features ``[n, d]``, logits ``[n, k]``. The
solves are conjugate gradient in float64, preconditioned by the diagonal blocks of the Hessian in
the span of the samples; what they have left is evaluated in ``numpy``'s long double (80 bits on
x86) and solved for again, until nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.longdouble]
Linear = Callable[[Tensor], Tensor]
LONG = np.longdouble
ROUNDING = 1e-15


def long(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().astype(LONG)


def short(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


def narrow(number: Any) -> Any:
    return np.float64(number) if np.ndim(number) == 0 else number.astype(np.float64)


def times(a: Array, b: Array) -> Array:
    """A product; in long double einsum's loops are twice as fast as matmul's."""
    return a @ b if a.dtype == np.float64 else np.einsum("ij,jk->ik", a, b)


@dataclass
class Samples:
    """``c * sum of loss(f_i, y_i)`` of logits ``f`` ``[n, k]``, in long double."""

    y: Array  # one row a sample: one-hot, or numbers
    squared: bool
    c: LONG

    def state(self, f: Array) -> Array:
        """What slope and curvature are computed from: probabilities, or the outputs."""
        if self.squared:
            return f
        e = np.exp(f - f.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def slope(self, p: Array) -> Array:
        return (2 if self.squared else 1) * self.c * (p - self.y)

    def curve(self, p: Array, u: Array) -> Array:
        """The second derivative times ``u`` ``[n, k]``."""
        if self.squared:
            return 2 * self.c * u
        return self.c * p * (u - (p * u).sum(axis=1, keepdims=True))

    def diagonal(self, p: Array) -> Array:
        if self.squared:
            return np.full_like(p, 2 * self.c)
        return self.c * p * (1 - p)


@dataclass
class Inner:
    """The regularised problem."""

    x: Array  # [n, d]
    loss: Samples
    anchor: Array  # [d, k]
    l2: LONG

    def state(self, w: Array) -> Array:
        return self.loss.state(times(self.x, w))

    def in_float64(self) -> Inner:
        loss = Samples(narrow(self.loss.y), self.loss.squared, narrow(self.loss.c))
        return Inner(narrow(self.x), loss, narrow(self.anchor), narrow(self.l2))

    def slope(self, w: Array, p: Array) -> Array:
        return times(self.x.T, self.loss.slope(p)) + self.l2 * (w - self.anchor)

    def product(self, p: Array, v: Array) -> Array:
        return times(self.x.T, self.loss.curve(p, times(self.x, v))) + self.l2 * v


class Curvature:
    """Solves with the Hessian ``X' S X + l2`` at probabilities ``p``; shapes ``[d, k]``."""

    def __init__(self, inner: Inner, basis: tuple[Tensor, Tensor], p: Array) -> None:
        self.inner, self.p = inner, p
        self.p64, self.l2 = short(p), float(inner.l2)
        self.basis, self.coordinates = basis  # orthonormal [d, r]; [n, r]
        self.gauge = not inner.loss.squared  # softmax: one number more for all classes is no change
        weights = short(inner.loss.diagonal(p)).clamp_min(0.0).sqrt()  # [n, k]
        rows = weights.t().unsqueeze(2) * self.coordinates  # [k, n, r]
        identity = self.l2**0.5 * torch.eye(self.coordinates.shape[1], dtype=torch.float64)
        stacked = torch.cat([rows, identity.expand(len(rows), -1, -1)], dim=1)
        factor = torch.linalg.qr(stacked, mode="r").R
        inverse = torch.linalg.solve_triangular(factor, identity / self.l2**0.5, upper=True)
        self.blocks = inverse @ inverse.mT  # [k, r, r], of each class alone
        self.total = torch.linalg.cholesky(self.blocks.sum(0)) if self.gauge else None

    def solve(self, b: Array) -> Array:
        """To rounding in long double where the system allows it."""
        v, before = np.zeros_like(b), np.inf
        for _ in range(8):
            left = b - self.inner.product(self.p, v)
            size = float(np.sqrt((left**2).sum())) / self.l2
            if not size < 0.5 * before:
                break
            better, before = v, size
            if size <= ROUNDING * float(np.sqrt((v**2).sum())):
                break
            v = v + self.direction(left)
        return better

    def direction(self, b: Array) -> Array:
        """An approximate solution, in float64, for a right-hand side of any size."""
        scale = np.abs(b).max()
        if scale == 0:
            return np.zeros_like(b)
        right = short(b / scale)
        inside = self.basis.t() @ right
        outside = right - self.basis @ inside
        outside -= self.basis @ (self.basis.t() @ outside)
        common = inside.mean(1, keepdim=True) if self.gauge else torch.zeros_like(inside[:, :1])
        solved = conjugate_gradient(self.apply, self.precondition, inside - common)
        v = self.basis @ (solved + common / self.l2) + outside / self.l2
        return v.numpy().astype(b.dtype) * scale

    def apply(self, v: Tensor) -> Tensor:
        """The product in the coordinates of the span, ``[r, k]``."""
        u, loss = self.coordinates @ v, self.inner.loss
        s = 2 * u if loss.squared else self.p64 * (u - (self.p64 * u).sum(1, keepdim=True))
        return float(loss.c) * (self.coordinates.t() @ s) + self.l2 * v

    def precondition(self, r: Tensor) -> Tensor:
        """The inverse of the diagonal blocks, among those ``[r, k]`` whose rows sum to 0."""
        each = torch.bmm(self.blocks, r.t().unsqueeze(2)).squeeze(2).t()
        if self.total is not None:
            common = torch.cholesky_solve(each.sum(1, keepdim=True), self.total)
            shared = torch.bmm(self.blocks, common.expand(len(self.blocks), -1, -1))
            each = each - shared.squeeze(2).t()
        return each


def conjugate_gradient(apply: Linear, precondition: Linear, b: Tensor) -> Tensor:
    v, r = torch.zeros_like(b), b
    z = precondition(r)
    p, rho = z, float((r * z).sum())
    end = 1e-16 * rho  # what is left is solved for again
    for _ in range(400):
        if not rho > end:
            break
        h = apply(p)
        step = rho / float((p * h).sum())
        v, r = v + step * p, r - step * h
        z = precondition(r)
        rho, before = float((r * z).sum()), rho
        p = z + (rho / before) * p
    return v
