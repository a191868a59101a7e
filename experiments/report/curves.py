"""Several seeds' curves as one: their mean, and a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Floats = np.ndarray
Curve = tuple[Sequence[float], Sequence[float]]


class Band(NamedTuple):
    """Values over ``at``, one-dimensional arrays of equal length."""

    at: Floats
    mean: Floats
    low: Floats
    high: Floats


def band(curves: Sequence[Curve]) -> Band | None:
    """Over where all of the curves are; between their points they are straight lines.

    Args:
        curves: (x, y) pairs, x ascending; points that are not finite are left out.

    Returns:
        None where there is no x that all of them cover.
    """
    kept = [_finite(curve) for curve in curves]
    kept = [curve for curve in kept if len(curve[0])]
    if not kept:
        return None
    first, last = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    at = np.unique(np.concatenate([x for x, _ in kept]))
    at = at[(at >= first) & (at <= last)]
    if not len(at):
        return None
    values = np.stack([np.interp(at, x, y) for x, y in kept])
    return Band(at, values.mean(0), values.min(0), values.max(0))


def first_reached(curve: Curve, threshold: float) -> float | None:
    """The first x at which y is at least the threshold."""
    return next((x for x, y in zip(*curve, strict=True) if y >= threshold), None)


def _finite(curve: Curve) -> tuple[Floats, Floats]:
    x, y = (np.asarray(values, dtype=float) for values in curve)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]
