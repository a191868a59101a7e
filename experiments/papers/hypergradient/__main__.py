"""The hypergradient experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.papers.hypergradient.learners import Method, methods
from experiments.papers.hypergradient.problems import Classification, Problem, Regression
from experiments.report.paper_figures import Curve, draw_errors
from experiments.tracking import TrackedExperiment, UserError, record
from l2l_implicit import UnsolvedWarning, checks

ex = TrackedExperiment("hypergradient")
LEAST = 1e-17  # below rounding: an error that is zero has a logarithm too


@ex.config
def defaults() -> None:
    problems = 3  # drawn anew; errors are their geometric mean
    inner_steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]  # K
    cg_steps = [2, 5, 10]  # N of iMAML
    head_cg_steps = [2, 5, 10, 20]  # N of Algorithm 1
    regression_sizes = [5, 20]  # parameters; conjugate gradient is exact after as many steps
    spread = 1000.0  # largest over smallest eigenvalue of the regression, without regulariser
    regression_l2 = 0.01  # iMAML's lambda
    ways = 5  # of the classification
    shots = 5
    width = 16  # features
    classification_l2 = 0.01
    threads = 1
    seed = 0
    output = "runs"  # the folder of the picture


@ex.named_config
def quick() -> None:
    """One problem of each kind, at most 200 inner steps: seconds."""
    problems = 1
    inner_steps = [1, 5, 20, 50, 200]


def _check(config: Mapping[str, Any]) -> None:
    try:
        for name in ("problems", "ways", "shots", "width"):
            checks.count(name, config[name])
        for name in ("inner_steps", "cg_steps", "head_cg_steps", "regression_sizes"):
            if not config[name]:
                raise ValueError(f"{name}: expected at least one number, got none; try [5, 20]")
            for number in config[name]:
                checks.count(name, number)
        for name in ("spread", "regression_l2", "classification_l2"):
            checks.positive(name, config[name])
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if config["spread"] < 1:
        raise UserError(f"spread: expected at least 1, got {config['spread']}; try 1000.0")


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


def _picture(run: Any, output: str) -> Path:
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "hypergradient.png"


@ex.automain
def hypergradient(
    _run: Any, _config: Mapping[str, Any], problems: int, inner_steps: Sequence[int],
    threads: int, seed: int, output: str,
) -> dict[str, float]:  # fmt: skip
    """Print the errors; returns those at the largest K."""
    _check(_config)
    torch.set_num_threads(threads)
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
    picture = _picture(_run, output)
    draw_errors(found).savefig(picture, dpi=120)
    _run.add_artifact(picture)
    print(f"\npicture: {picture}")
    return _result(found)
