"""What is run and measured: trajectories of the exact squared hypergradient norm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from experiments.papers.convergence.algorithm_1 import Algorithm1, Settings
from experiments.papers.convergence.problem import Tasks
from experiments.statistics import Mean, seeds_mean
from l2l_implicit import UnsolvedWarning

Tick = Callable[[int], object]


def trajectory(
    tasks: Tasks, settings: Settings, steps: int, batch: int | None, seed: int, tick: Tick
) -> list[float]:
    r""":math:`\|\nabla F(\theta_t)\|^2` for t = 0 to T - 1, exact.

    Args:
        tasks: the population.
        settings: of Algorithm 1, started from theta = 0.
        steps: outer iterations T.
        batch: tasks drawn with replacement at every iteration; None: all, as in Theorem 2.
        seed: of the draws.
        tick: told of every iteration done.
    """
    number, p, q = len(tasks.y), tasks.c.shape[2], tasks.y.shape[1]
    generator = torch.Generator().manual_seed(seed)
    algorithm = Algorithm1(batch or number, q, settings, torch.zeros(p, dtype=torch.float64))
    norms = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # too few steps is what is measured
        for _ in range(steps):
            norms.append(float(tasks.exact(algorithm.theta.detach()).hypergradient.square().sum()))
            drawn = tasks
            if batch is not None:
                drawn = tasks.subset(torch.randint(number, (batch,), generator=generator))
            algorithm.step(drawn)
            tick(1)
    return norms


def averages(norms: Sequence[float]) -> list[float]:
    """The means of the first 1, 2, ..., T values: the left side of Theorems 1 and 2."""
    return list(np.cumsum(norms) / np.arange(1, len(norms) + 1))


def floor(norms: Sequence[float]) -> float:
    """The mean of the second half, when the start is forgotten."""
    return float(np.mean(norms[len(norms) // 2 :]))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def last_decade(curve: Sequence[float]) -> float:
    """The slope of ``curve`` against T from a tenth of its length on."""
    first, number = max(1, len(curve) // 10), len(curve)
    at = sorted({round(t) for t in np.geomspace(first, number, 40)})
    return slope(at, [curve[t - 1] for t in at])


def log_spaced(number: int) -> list[int]:
    """1 to ``number``, about ten points a decade, both ends included."""
    points = max(2, round(10 * math.log10(number)) + 1)
    return sorted({round(t) for t in np.geomspace(1, number, points)})


def evaluations(settings: Settings, tasks: int) -> int:
    """Gradient evaluations of one outer iteration.

    For each task K inner gradients, N + 1 Hessian products, the gradient of f and the mixed
    product, all of about the same cost.
    """
    return tasks * (settings.inner_steps + settings.cg_steps + 3)


def first_below(curve: Sequence[float], epsilon: float) -> int | None:
    """The smallest T with an average of at most ``epsilon`` (Definition 1)."""
    return next((t for t, value in enumerate(curve, 1) if value <= epsilon), None)


class Cost(NamedTuple):
    """Evaluations up to an epsilon-solution, and the batch size that needed the fewest."""

    epsilon: float
    evaluations: int
    batch: int


def cheapest(
    curves: Mapping[int, Sequence[float]], settings: Settings, epsilons: Sequence[float]
) -> list[Cost]:
    """For every epsilon that some batch size reaches, the cheapest of them.

    Args:
        curves: averages by batch size.
        settings: with which they were run.
        epsilons: largest first.
    """
    found = []
    for epsilon in epsilons:
        reached = {batch: first_below(curve, epsilon) for batch, curve in curves.items()}
        costs = [
            Cost(epsilon, t * evaluations(settings, batch), batch)
            for batch, t in reached.items()
            if t is not None
        ]
        if costs:
            found.append(min(costs, key=lambda cost: cost.evaluations))
    return found


def over_seeds(values: Sequence[float]) -> Mean:
    """The mean with its 95 % interval."""
    return seeds_mean(values)
