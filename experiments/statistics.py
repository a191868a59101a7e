"""Means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Mean(NamedTuple):
    """A mean, the half width of its 95 % interval (nan: one value has none), and of how many."""

    mean: float
    half_width: float
    number: int


def seeds_mean(values: Sequence[float]) -> Mean:
    """Over seeds: Student's t with one degree of freedom less than there are finite values."""
    finite = np.array([value for value in values if math.isfinite(value)])
    number = len(finite)
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the largest there is
        mean = float(finite.mean()) if number else math.nan
        error = float(stats.sem(finite)) if number > 1 else math.nan
    return Mean(mean, float(stats.t.ppf(0.975, number - 1)) * error, number)
