"""Means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

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
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the largest there is
        mean, deviation = float(np.mean(finite)), np.std(finite, ddof=min(1, number - 1))
    if number == 1:
        return Mean(mean, math.nan, 1)
    t = stats.t.ppf((1 + LEVEL) / 2, number - 1)
    return Mean(mean, float(t * deviation / math.sqrt(number)), number)
