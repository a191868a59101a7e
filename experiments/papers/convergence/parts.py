"""The four parts of the experiment: trajectories of the exact squared hypergradient norm, and what
is fitted to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from experiments.papers.convergence.algorithm_1 import Algorithm1, Settings
from experiments.papers.convergence.problem import Tasks
from experiments.papers.convergence.theory import (
    ProblemConstants,
    hypergradient_lipschitz,
    inner_lr,
    least_inner_steps,
    least_linear_steps,
)
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


class Bounds(NamedTuple):
    """The largest over the problems of what theory asks for, and the smallest step sizes."""

    inner_steps: int
    cg_steps: int
    inner_lr: float
    meta_lr: float


class Plan(NamedTuple):
    """The configuration, as the parts read it."""

    problems: Sequence[Tasks]
    bounds: Bounds
    meta_lr: float
    iterations: int
    stochastic_iterations: int
    bound_iterations: int
    batches: Sequence[int]
    multiples: Sequence[float]

    @property
    def settings(self) -> Settings:
        """K_0 and N_0."""
        return Settings(
            self.bounds.inner_steps, self.bounds.cg_steps, self.bounds.inner_lr, self.meta_lr
        )

    def stochastic_inner_steps(self) -> list[int]:
        """K with batches."""
        return [max(1, round(m * self.bounds.inner_steps)) for m in self.multiples]

    def total(self) -> int:
        """Outer iterations in all."""
        stochastic = len(self.multiples) * len(self.batches) * self.stochastic_iterations
        undercut = 2 * sum(len(grid(n)) for n in self.bounds[:2]) * self.bound_iterations
        return len(self.problems) * (self.iterations + stochastic + undercut)


def bounds_of(constants: Sequence[ProblemConstants], unknowns: int) -> Bounds:
    """What holds for all problems alike."""
    lr = min(inner_lr(c) for c in constants)
    return Bounds(
        max(least_inner_steps(c, lr) for c in constants),
        max(least_linear_steps(c, unknowns) for c in constants),
        lr,
        min(1.0 / hypergradient_lipschitz(c) for c in constants),
    )


def grid(bound: int) -> list[int]:
    """Below, at and above a bound."""
    below = [n for n in (1, 2, 5, bound // 2) if 0 < n < bound]
    return sorted({*below, bound, 2 * bound})


class Deterministic(NamedTuple):
    """Theorem 2: curves by problem, their slopes, and evaluations by epsilon (problem 0's)."""

    norms: list[list[float]]
    averages: list[list[float]]
    slope: Mean
    evaluations: list[Cost]
    evaluations_slope: Mean


def deterministic(plan: Plan, tick: Tick) -> Deterministic:
    """All tasks at every iteration."""
    norms = [
        trajectory(tasks, plan.settings, plan.iterations, None, 0, tick) for tasks in plan.problems
    ]
    curves = [averages(n) for n in norms]
    number = len(plan.problems[0].y)
    costs = [_costs(curve, plan.settings, number) for curve in curves]
    slopes = [slope([1 / c.epsilon for c in cost], [c.evaluations for c in cost]) for cost in costs]
    found = seeds_mean([last_decade(curve) for curve in curves])
    return Deterministic(norms, curves, found, costs[0], seeds_mean(slopes))


def _costs(curve: Sequence[float], settings: Settings, number: int) -> list[Cost]:
    """At ten accuracies, down to the last that is reached, over the last decade of T."""
    each = evaluations(settings, number)
    epsilons = np.geomspace(curve[max(1, len(curve) // 10) - 1], curve[-1] * 1.0000001, 10)
    pairs = [(e, first_below(curve, e)) for e in map(float, epsilons)]
    return [Cost(e, t * each, number) for e, t in pairs if t is not None]


class Stochastic(NamedTuple):
    """Theorem 1 at one K: the floor by batch size, its slopes, the cheapest batch by epsilon."""

    inner_steps: int
    floors: dict[int, Mean]
    slope: Mean
    costs: list[Cost]
    costs_slope: float


def stochastic(plan: Plan, inner_steps: int, tick: Tick) -> Stochastic:
    """Fresh tasks at every iteration; a slot starts where it was, as Algorithm 1 says."""
    settings = plan.settings._replace(inner_steps=inner_steps)
    norms = {
        batch: [
            trajectory(tasks, settings, plan.stochastic_iterations, batch, seed, tick)
            for seed, tasks in enumerate(plan.problems)
        ]
        for batch in plan.batches
    }
    floors = {batch: [floor(n) for n in each] for batch, each in norms.items()}
    slopes = [
        slope(plan.batches, [floors[b][i] for b in plan.batches])
        for i in range(len(plan.problems))
    ]
    curves = {b: np.mean([averages(n) for n in each], axis=0) for b, each in norms.items()}
    costs = cheapest(curves, settings, _epsilons(curves))
    ends = [c.epsilon for c in costs], [c.evaluations for c in costs]
    return Stochastic(
        inner_steps,
        {batch: seeds_mean(values) for batch, values in floors.items()},
        seeds_mean(slopes),
        costs,
        -slope(*ends) if len(costs) > 1 else float("nan"),
    )


def _epsilons(curves: Mapping[int, Sequence[float]]) -> list[float]:
    """From what the first tenth of the run reaches down to what its end does."""
    length = len(next(iter(curves.values())))
    high = min(curve[length // 10] for curve in curves.values())
    low = min(curve[-1] for curve in curves.values())
    return [float(e) for e in np.geomspace(high, 1.02 * low, 10)]


Undercut = dict[str, dict[int, Mean]]


def around_bounds(plan: Plan, what: str, tick: Tick) -> Undercut:
    """The last squared norm with fewer and more steps than the bound, all tasks at every iteration.

    Args:
        plan: the configuration.
        what: ``inner_steps`` (K, at N_0) or ``cg_steps`` (N, at K_0).
        tick: told of every iteration done.

    Returns:
        By start (``warm``: from the last outer iteration; ``cold``: from zero) and steps.
    """
    found: Undercut = {"warm": {}, "cold": {}}
    for start, by_steps in found.items():
        for steps in grid(getattr(plan.bounds, what)):
            settings = plan.settings._replace(warm=start == "warm", **{what: steps})
            ends = [
                trajectory(tasks, settings, plan.bound_iterations, None, 0, tick)[-1]
                for tasks in plan.problems
            ]
            by_steps[steps] = seeds_mean(ends)
    return found
