"""The hypergradient of a linear head in extended precision; it shares no code with the library.

The inner problem is ``c * loss(X W, y) + l2/2 ||W - A||^2`` over ``W`` of shape ``[d, k]`` (a bias
is one more column of ones in ``X``), strongly convex with constant ``l2``.

The answer is computed twice: with the weights as unknowns, and with one unknown a logit, in which
the equations, their cancellations and their rounding are others (the slope of the loss is then an
unknown, not a difference of two nearly equal numbers). ``Truth.doubt``, the relative distance of
the two answers, says how far the oracle itself can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from head_curvature import LONG, ROUNDING, Array, Curvature, Inner, short, times
from torch import Tensor

Query = Callable[[Array], Array]


class Truth(NamedTuple):
    """The query loss's derivatives."""

    features: Tensor  # [n, d] of the support features, without the column of a bias
    l2: float
    start: Tensor  # [d, k] of the anchor
    l2_scale: float  # ||v|| ||W - A||, or a thousandth of what W - A sums where that cancels
    rounding: float  # of the features' gradient where probabilities are rounded to float64
    weights: Array  # [d, k], the minimum
    doubt: float


def minimize(
    inner: Inner, basis: tuple[Tensor, Tensor], w: Array, rounding: float
) -> tuple[Array, Curvature]:
    """The minimum by Newton with an exact line search, and the curvature there."""
    best, found, idle = np.inf, None, 0
    for _ in range(100):
        p = inner.state(w)
        slope = inner.slope(w, p)
        size = float(np.sqrt((slope**2).sum()) / inner.l2)  # bounds the distance to the minimum
        curvature = Curvature(inner, basis, p)
        idle = 0 if size < 0.5 * best else idle + 1
        if size < best or found is None:
            best, found = size, (w, curvature)
        if size <= rounding * float(np.sqrt((w**2).sum())) or (idle > 2 and near(found)):
            break
        direction = curvature.direction(-slope)
        w = w + best_step(inner, w, direction) * direction
    assert found is not None
    return found


def near(found: tuple[Array, Curvature]) -> bool:
    """Whether Newton's next step is one of rounding only."""
    w, curvature = found
    step = curvature.direction(curvature.inner.slope(w, curvature.p))
    return bool(np.abs(step).max() <= 1e-9 * np.abs(w).max())


def best_step(inner: Inner, w: Array, direction: Array) -> LONG:
    """Where the convex objective's slope along ``direction`` changes its sign; 1 near the end."""
    f, df = times(inner.x, w), times(inner.x, direction)
    pull = inner.l2 * ((w - inner.anchor) * direction).sum()
    push = inner.l2 * (direction**2).sum()

    def slope(t: LONG) -> LONG:
        return (inner.loss.slope(inner.loss.state(f + t * df)) * df).sum() + pull + t * push

    low, high = 0 * inner.l2, 0 * inner.l2 + 1
    if abs(slope(high)) <= 1e-2 * abs(slope(low)):
        return high
    while slope(high) < 0 and high < 1e15:
        low, high = high, 4 * high
    while low == 0 and high > 1e-30:
        low, high = (high / 4, high) if slope(high / 4) < 0 else (low, high / 4)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


class Solution(NamedTuple):
    """The minimum, the linear system's solution, and what the loss makes of both."""

    w: Array
    v: Array
    slope: Array  # of the loss in the logits at W, [n, k]
    curve: Array  # its second derivative there times X v, [n, k]

    def answer(self, inner: Inner, width: int) -> tuple[Array, LONG, Array]:
        """Minus the mixed derivatives times ``v``: in the features, in ``l2``, in the anchor."""
        features = times(self.slope, self.v.T) + times(self.curve, self.w.T)
        return -features[:, :width], -((self.w - inner.anchor) * self.v).sum(), inner.l2 * self.v


def of_weights(curvature: Curvature, w: Array, b: Array) -> Solution:
    """With the weights as unknowns."""
    inner, p = curvature.inner, curvature.p
    v = curvature.solve(b)
    return Solution(w, v, inner.loss.slope(p), inner.loss.curve(p, times(inner.x, v)))


def of_samples(curvature: Curvature, first: Solution, query: Query) -> Solution:
    """With one unknown a logit: ``W = A - X' slope / l2`` and ``v = (b - X' curve) / l2``."""
    inner, x = curvature.inner, curvature.inner.x

    def weights(slope: Array) -> Array:
        return inner.anchor - times(x.T, slope) / inner.l2

    def wrong_slope(slope: Array) -> Array:
        return slope - inner.loss.slope(inner.state(weights(slope)))

    slope = refine(curvature, wrong_slope, first.slope)
    w = weights(slope)
    b, p = query(w), inner.state(w)

    def solved(curve: Array) -> Array:
        return (b - times(x.T, curve)) / inner.l2

    def wrong_curve(curve: Array) -> Array:
        return curve - inner.loss.curve(p, times(x, solved(curve)))

    curve = refine(curvature, wrong_curve, first.curve)
    return Solution(w, solved(curve), slope, curve)


def refine(curvature: Curvature, wrong: Callable[[Array], Array], start: Array) -> Array:
    """Newton's on ``wrong(u) = 0``; ``(I + S X X' / l2)^-1 = I - S X H^-1 X'``."""
    x, loss = curvature.inner.x, curvature.inner.loss
    u, best, before = start, start, np.inf
    for _ in range(6):
        left = wrong(u)
        size = float(np.sqrt((left**2).sum()))
        if not size < before:
            break
        best, before = u, size
        back = times(x, curvature.solve(times(x.T, left)))
        u = u - left + loss.curve(curvature.p, back)
    return best


def distance(one: Array, other: Array) -> float:
    size = float(np.sqrt((other**2).sum()))
    gap = float(np.sqrt(((one - other) ** 2).sum()))
    return gap / size if size else float(gap > 0)


def span(x: Array) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``[d, r]`` of the samples' span, and their coordinates ``[n, r]``."""
    basis, coordinates = torch.linalg.qr(short(x).t())
    return basis, coordinates.t()


def hypergradient(inner: Inner, query: Query, width: int) -> tuple[Truth, Curvature]:
    """``query`` is the outer loss's gradient in ``W``; ``width`` the features without a bias."""
    basis, rough = span(inner.x), inner.in_float64()
    w, _ = minimize(rough, basis, rough.anchor, 1e-9)
    w, curvature = minimize(inner, basis, w.astype(LONG), ROUNDING)
    first = of_weights(curvature, w, query(w))
    features, l2, start = first.answer(inner, width)
    moved = np.sqrt(((w - inner.anchor) ** 2).sum())
    summed = np.sqrt((inner.x**2).sum() * (first.slope**2).sum()) / inner.l2
    scale = np.sqrt((first.v**2).sum()) * max(moved, LONG(1e-3) * summed)
    again = of_samples(curvature, first, query).answer(inner, width)
    doubt = max(
        distance(again[0], features),
        float(abs(again[1] - l2) / scale) if scale else 0.0,
        distance(again[2], start),
    )
    sizes = inner.loss.c * np.sqrt(len(inner.x) * (first.v**2).sum())
    moving = float(np.finfo(np.float64).eps * sizes)
    size = float(np.sqrt((features**2).sum()))
    rounding = moving / size if size > 0 else float(moving > 0)
    parts = short(features), float(l2), short(start), float(scale), rounding
    return Truth(*parts, w, doubt), curvature
