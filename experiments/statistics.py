"""Means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Mean(NamedTuple):
    """A mean, the half width of its 95 % interval (nan: one value has none), and of how many."""

    mean: float
    half_width: float
    number: int


def seeds_mean(values: Sequence[float]) -> Mean:
    """Over seeds: Student's t with one degree of freedom less than there are finite values."""
    finite = [value for value in values if math.isfinite(value)]
    number = len(finite)
    if number == 0:
        return Mean(math.nan, math.nan, 0)
    mean = math.fsum(finite) / number
    if number == 1:
        return Mean(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in finite) / (number - 1)
    return Mean(mean, t_quantile(number - 1) * math.sqrt(variance / number), number)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t for which a Student variable lies within +-t with probability ``level``.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}; two values give 1")
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) by the finite series for whole degrees of freedom.

    Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
