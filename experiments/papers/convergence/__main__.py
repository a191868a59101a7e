"""The convergence experiment: its settings, its four parts, and what is fitted to their
trajectories; see the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from experiments.ingredients.model import within_limits
from experiments.papers import PaperSettings, Points
from experiments.papers.convergence import theory
from experiments.papers.convergence.problem import Settings, make_tasks, trajectory
from experiments.statistics import Mean, seeds_mean
from experiments.tracking import TrackedExperiment, wrong
from experiments.tracking.config import MOST, Count, Counts, NotNegative, OfTuple, Positive

Length = Annotated[int, Field(ge=20, le=MOST)]  # for a slope


class ConvergenceSettings(PaperSettings):
    """The settings of this experiment."""

    # drawn anew, for the confidence of the slopes
    problems: Annotated[int, Field(ge=2, le=MOST)] = 3
    tasks: Count = 32  # of the population
    theta_size: Count = 5  # dimensions of theta
    phi_size: Count = 20  # dimensions of phi
    # of the quadratic part of the inner problem
    condition: Annotated[float, Field(ge=1)] = 10.0
    bend: Positive = 0.5  # coefficient of its log-cosh part
    strength: Positive = 4.0  # by which theta acts on the inner problem
    spread: NotNegative = 1.0  # of the tasks
    meta_lr: Positive = 1.0  # outer step size
    iterations: Length = 400  # T with all tasks
    stochastic_iterations: Length = 200  # T with batches
    bound_iterations: Length = 60  # T around K_0 and N_0
    batches: Counts = [1, 4, 16, 64, 256]  # |B|
    # K with batches, times K_0
    stochastic_inner: Annotated[list[Positive], Field(min_length=1), OfTuple] = [
        0.25, 1.0, 3.0,
    ]  # fmt: skip

    @model_validator(mode="after")
    def _fit_together(self) -> ConvergenceSettings:
        if len(set(self.batches)) < 2:
            raise wrong("batches", "two different ones at least", self.batches, "one has no slope")
        if self.theta_size > self.phi_size:
            most = f"at most phi_size={self.phi_size}"
            raise wrong("theta_size", most, self.theta_size, "raise phi_size")
        return self


ex = TrackedExperiment("convergence", settings=ConvergenceSettings)


@ex.named_config
def quick() -> None:
    """Two smaller problems and shorter runs: under a minute, and rougher."""
    problems = 2
    tasks = 8
    phi_size = 12
    iterations = 150
    stochastic_iterations = 60
    bound_iterations = 20
    batches = [1, 8, 64]


def averages(norms: Sequence[float]) -> list[float]:
    """The means of the first 1, 2, ..., T values: the left side of Theorems 1 and 2."""
    return list(np.cumsum(norms) / np.arange(1, len(norms) + 1))


def floor(norms: Sequence[float]) -> float:
    """The mean of the second half, when the start is forgotten."""
    return float(np.mean(norms[len(norms) // 2 :]))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def log_spaced(first: int, last: int, points: int) -> list[int]:
    """Whole numbers, both ends included."""
    return sorted({round(t) for t in np.geomspace(first, last, points)})


def last_decade(curve: Sequence[float]) -> float:
    """The slope of ``curve`` against T from a tenth of its length on."""
    at = log_spaced(max(1, len(curve) // 10), len(curve), 40)
    return slope(at, [curve[t - 1] for t in at])


def cheapest(
    curves: Mapping[int, Sequence[float]], settings: Settings, high: float, low: float
) -> dict[float, int]:
    """Gradient evaluations up to an average of at most epsilon (Definition 1), by the batch size
    that needs the fewest.

    The averages are given by batch size. Of ten epsilons, from high to low, those that nothing
    reaches are left out.
    """
    # of a task: K inner gradients, N + 1 Hessian products, the gradient of f and the mixed product
    each, found = settings.inner_steps + settings.cg_steps + 3, {}
    for epsilon in map(float, np.geomspace(high, low, 10)):
        below = {b: np.flatnonzero(np.asarray(curve) <= epsilon) for b, curve in curves.items()}
        costs = [batch * each * int(at[0] + 1) for batch, at in below.items() if len(at)]
        if costs:
            found[epsilon] = min(costs)
    return found


def costs_slope(costs: Mapping[float, int]) -> float:
    """Of evaluations against 1/epsilon."""
    return -slope(list(costs), list(costs.values())) if len(costs) > 1 else math.nan


def grid(bound: int) -> list[int]:
    """Below, at and above a bound."""
    return sorted({n for n in (1, 2, 5, bound // 2) if 0 < n < bound} | {bound, 2 * bound})


Slopes = dict[str, Mean]
"""What is claimed of, as the results name it (see `experiments.report.papers`)."""


class Experiment:
    """The problems, what theory asks for on all of them alike, and what is measured.

    Attributes:
        bounds: K_0, N_0 and the smallest inner step size, with the configured outer one.
        inverse_l_f: the smallest 1 / L_F.
    """

    def __init__(self, c: ConvergenceSettings, points: Points) -> None:
        self.c, self._points = c, points
        sizes = (c.tasks, c.theta_size, c.phi_size)
        shape = (c.condition, c.bend, c.strength, c.spread)
        self._problems = [make_tasks(*sizes, *shape, 1000 * c.seed + i) for i in range(c.problems)]
        constants = [tasks.constants() for tasks in self._problems]
        lr = min(theory.inner_lr(each) for each in constants)
        self.bounds = Settings(
            max(theory.least_inner_steps(each, lr) for each in constants),
            max(theory.least_linear_steps(each, c.phi_size) for each in constants),
            lr,
            c.meta_lr,
        )
        self.inverse_l_f = min(1 / theory.hypergradient_lipschitz(each) for each in constants)
        around = 2 * sum(len(grid(bound)) for bound in self.bounds[:2]) * c.bound_iterations
        stochastic = len(c.stochastic_inner) * len(c.batches) * c.stochastic_iterations
        total = c.problems * (c.iterations + stochastic + around)
        self._bar = tqdm(total=total, desc="outer iterations", mininterval=1.0)

    def slopes(self) -> Slopes:
        """All parts, one after the other."""
        with self._bar:
            found = self._theorem_2()
            self._around_bounds()
            for multiple in self.c.stochastic_inner:
                found |= self._theorem_1(max(1, round(multiple * self.bounds.inner_steps)))
        return found

    def _run(self, settings: Settings, steps: int, batch: int | None = None) -> list[list[float]]:
        """`trajectory` on every problem."""
        return [trajectory(tasks, settings, steps, batch, seed, self._bar.update)
                for seed, tasks in enumerate(self._problems)]  # fmt: skip

    def _theorem_2(self) -> Slopes:
        """All tasks at every iteration; accuracies are those of the last decade of T."""
        length = self.c.iterations
        norms = self._run(self.bounds, length)
        curves, costs = [averages(n) for n in norms], []
        for number, (curve, last) in enumerate(zip(curves, norms, strict=True)):
            name = f"convergence/all_tasks/{number}"
            for t in log_spaced(1, length, round(10 * math.log10(length)) + 1):  # ten a decade
                self._points.record({f"{name}/average": curve[t - 1], f"{name}/last": last[t - 1]},
                                    t)  # fmt: skip
            costs.append(cheapest({self.c.tasks: curve}, self.bounds, curve[length // 10 - 1],
                                  curve[-1] * 1.0000001))  # fmt: skip
        return {"average_against_T": seeds_mean([last_decade(curve) for curve in curves]),
                "evaluations_all_tasks": seeds_mean([costs_slope(c) for c in costs])}  # fmt: skip

    def _theorem_1(self, inner_steps: int) -> Slopes:
        """Fresh tasks at every iteration; a slot starts where it was, as Algorithm 1 says.

        Accuracies go from what the first tenth of the run reaches to what its end does.
        """
        settings = self.bounds._replace(inner_steps=inner_steps)
        length = self.c.stochastic_iterations
        norms = {batch: self._run(settings, length, batch) for batch in self.c.batches}
        floors = {batch: [floor(n) for n in each] for batch, each in norms.items()}
        for batch, values in floors.items():
            mean, half_width, _ = seeds_mean(values)
            name = f"convergence/floor/{inner_steps}"
            self._points.record({name: mean, f"{name}/half_width": half_width}, batch)
        curves = {b: np.mean([averages(n) for n in each], axis=0) for b, each in norms.items()}
        high, low = (min(curve[at] for curve in curves.values()) for at in (length // 10, -1))
        costs = cheapest(curves, settings, high, 1.02 * low)
        slopes = [slope(list(floors), each) for each in zip(*floors.values(), strict=True)]
        return {f"floor_K{inner_steps}": seeds_mean(slopes),
                f"evaluations_K{inner_steps}": Mean(costs_slope(costs), math.nan, 1)}  # fmt: skip

    def _around_bounds(self) -> None:
        """The last squared norm with fewer and more steps than the bounds (K at N_0, N at K_0),
        from warm starts and cold ones, all tasks at every iteration."""
        for what, start in product(("inner_steps", "cg_steps"), ("warm", "cold")):
            for steps in grid(getattr(self.bounds, what)):
                settings = self.bounds._replace(warm=start == "warm", **{what: steps})
                runs = self._run(settings, self.c.bound_iterations)
                mean = seeds_mean([norms[-1] for norms in runs]).mean
                self._points.record({f"convergence/{what}/{start}": mean}, steps)


@ex.automain
@within_limits()
def convergence(_run: Any) -> dict[str, Any]:
    """Print the slopes; returns them with their half widths of 95 % intervals."""
    c = ConvergenceSettings.of(_run.config)
    points = Points(_run, c)
    experiment = Experiment(c, points)
    bounds = experiment.bounds
    result: dict[str, Any] = {"K_0": bounds.inner_steps, "N_0": bounds.cg_steps,
                              "inner_lr": bounds.inner_lr, "inverse_L_F": experiment.inverse_l_f}
    for name, (mean, half_width, _) in experiment.slopes().items():
        result[f"slope_{name}"] = mean
        if math.isfinite(half_width):
            result[f"slope_{name}_half_width"] = half_width
    points.show("convergence", result)
    print(f"\nK_0 = {bounds.inner_steps}, N_0 = {bounds.cg_steps} at lambda_phi = 1 / l_g ="
          f" {bounds.inner_lr:.4f}; 1 / L_F = {experiment.inverse_l_f:.4f}")  # fmt: skip
    return result
