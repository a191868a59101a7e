"""The hypergradient experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from experiments.ingredients.model import use_threads, within_limits
from experiments.papers.hypergradient.problems import (
    Classification,
    Method,
    Problem,
    Regression,
    methods,
)
from experiments.report.paper_figures import Curve, draw_errors
from experiments.tracking import TrackedExperiment, record
from experiments.tracking.config import Count, Counts, Positive, RunSettings, Seed, Text, Threads
from experiments.training.outcome import new_folder
from l2l_implicit import UnsolvedWarning

LEAST = 1e-17  # below rounding: an error that is zero has a logarithm too


class HypergradientSettings(RunSettings):
    """The settings of this experiment."""

    problems: Count = 3  # drawn anew; errors are their geometric mean
    inner_steps: Counts = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]  # K
    cg_steps: Counts = [2, 5, 10]  # N of iMAML
    head_cg_steps: Counts = [2, 5, 10, 20]  # N of Algorithm 1
    # parameters; conjugate gradient is exact after as many steps
    regression_sizes: Counts = [5, 20]
    # largest over smallest eigenvalue of the regression, without regulariser
    spread: Annotated[float, Field(ge=1)] = 1000.0
    regression_l2: Positive = 0.01  # iMAML's lambda
    ways: Count = 5  # of the classification
    shots: Count = 5  # of the classification
    width: Count = 16  # features
    classification_l2: Positive = 0.01  # of the heads
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of the problems
    output: Text = "runs"  # the folder of the picture


ex = TrackedExperiment("hypergradient", settings=HypergradientSettings)


@ex.named_config
def quick() -> None:
    """One problem of each kind, at most 200 inner steps: seconds."""
    problems = 1
    inner_steps = [1, 5, 20, 50, 200]


Make = Callable[[int], Problem]


def _problems(c: Mapping[str, Any]) -> dict[str, tuple[Make, dict[str, Method]]]:
    """How each is made from a seed, and the methods it is for."""
    imaml = methods(("imaml", "maml"), c["cg_steps"])
    made: dict[str, tuple[Make, dict[str, Method]]] = {
        f"regression_{size}": (
            lambda seed, size=size: Regression(size, c["spread"], c["regression_l2"], seed),
            imaml,
        )
        for size in c["regression_sizes"]
    }
    shape = (c["ways"], c["shots"], c["width"], c["classification_l2"])
    heads = methods(("rm_metal", "itd_bio"), c["head_cg_steps"])
    made["logistic"] = lambda seed: Classification(*shape, seed), heads
    return made


def curves_of(
    tasks: Sequence[Problem], by_name: Mapping[str, Method], inner_steps: Sequence[int],
    tick: Callable[[int], object],
) -> Mapping[str, Curve]:  # fmt: skip
    """Geometric means over the problems of the relative errors, by method and K."""
    exact = [task.exact() for task in tasks]
    curves: dict[str, dict[int, float]] = {}
    for name, method in by_name.items():
        for steps in inner_steps:
            logs = []
            for task, truth in zip(tasks, exact, strict=True):
                found = task.estimate(method.make(task), steps, method.penalty)
                logs.append(math.log(max(float((found - truth).norm() / truth.norm()), LEAST)))
                tick(steps)
            curves.setdefault(name, {})[steps] = math.exp(math.fsum(logs) / len(logs))
    return curves


def _text(title: str, condition: float, curves: Mapping[str, Curve]) -> str:
    steps = list(next(iter(curves.values())))
    lines = ["", f"{title}, condition number {condition:.0f}: relative error against K"]
    lines.append(f"{'':28}" + " ".join(f"{k:8d}" for k in steps))
    lines += [
        f"{name:28}" + " ".join(f"{value:8.1e}" for value in by_steps.values())
        for name, by_steps in curves.items()
    ]
    return "\n".join(lines)


def _result(found: Mapping[str, Mapping[str, Curve]]) -> dict[str, float]:
    """The errors at the last K."""
    return {
        f"{problem}/{name}": list(by_steps.values())[-1]
        for problem, curves in found.items()
        for name, by_steps in curves.items()
    }


@ex.automain
@within_limits()
def hypergradient(
    _run: Any, _config: Mapping[str, Any], problems: int, inner_steps: Sequence[int],
    threads: int, seed: int, output: str,
) -> dict[str, float]:  # fmt: skip
    """Print the errors; returns those at the largest K."""
    use_threads(threads)
    picture = new_folder(_run, output) / "hypergradient.png"
    inner_steps, kinds = sorted(set(inner_steps)), _problems(_config)
    each = problems * sum(inner_steps)
    total = sum(each * len(by_name) for _, by_name in kinds.values())
    found: dict[str, Mapping[str, Curve]] = {}
    with warnings.catch_warnings(), tqdm(total=total, desc="inner steps", mininterval=1.0) as bar:
        warnings.simplefilter("ignore", UnsolvedWarning)  # too few steps is what is measured
        for title, (make, by_name) in kinds.items():
            tasks = [make(1000 * seed + i) for i in range(problems)]
            curves = curves_of(tasks, by_name, inner_steps, bar.update)
            for name, by_steps in curves.items():
                for steps, error in by_steps.items():
                    record(_run, {f"hypergradient/{title}/{name}": error}, steps)
            tqdm.write(_text(title, tasks[0].condition, curves))
            found[title] = curves
    draw_errors(found).savefig(picture, dpi=120)
    _run.add_artifact(picture)
    print(f"\npicture: {picture}")
    return _result(found)
