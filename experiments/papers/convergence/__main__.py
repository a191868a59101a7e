"""The convergence experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from experiments.ingredients.model import use_threads, within_limits
from experiments.papers.convergence.parts import (
    ConvergenceSettings,
    Deterministic,
    Plan,
    Stochastic,
    Undercut,
    around_bounds,
    costs_slope,
    deterministic,
    log_spaced,
    stochastic,
)
from experiments.report.paper_figures import Findings, draw_convergence
from experiments.report.paper_figures import show_mean as show
from experiments.tracking import TrackedExperiment, record
from experiments.training.outcome import folder_of

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


def _record_theorem_2(run: Any, found: Deterministic) -> None:
    """About ten points a decade."""
    length = len(found.norms[0])
    for number, (curve, norms) in enumerate(zip(found.averages, found.norms, strict=True)):
        name = f"convergence/all_tasks/{number}"
        for t in log_spaced(1, length, round(10 * math.log10(length)) + 1):
            record(run, {f"{name}/average": curve[t - 1], f"{name}/last": norms[t - 1]}, t)
    _record_costs(run, "all_tasks", found.costs)


def _record_theorem_1(run: Any, found: Stochastic) -> None:
    name = f"convergence/floor/{found.inner_steps}"
    for batch, value in found.floors.by_batch.items():
        record(run, {name: value.mean, f"{name}/half_width": value.half_width}, batch)
    _record_costs(run, f"batches/{found.inner_steps}", found.costs)


def _record_costs(run: Any, name: str, costs: Mapping[float, int]) -> None:
    for epsilon, number in costs.items():
        record(run, {f"convergence/evaluations/{name}": number}, round(1 / epsilon))


def _text(
    plan: Plan, all_tasks: Deterministic, batches: Sequence[Stochastic],
    undercut: Mapping[str, Undercut],
) -> str:  # fmt: skip
    """The tables."""
    lines = [
        "",
        f"K_0 = {plan.bounds.inner_steps}, N_0 = {plan.bounds.cg_steps} at lambda_phi = 1 / l_g = "
        f"{plan.bounds.inner_lr:.4f}; 1 / L_F = {plan.inverse_l_f:.4f}",
        "",
        f"Theorem 2    average against T        slope {show(all_tasks.slope)} (claimed -1)",
        f"Corollary 1  evaluations to 1/epsilon  slope {show(all_tasks.costs_slope)} "
        "(claimed 1), all tasks",
    ]
    for each in batches:
        lines.append(
            f"Theorem 1    floor against |B|       slope {show(each.floors.slope)} (claimed -1), "
            f"K = {each.inner_steps}; evaluations to 1/epsilon, best |B|: "
            f"{costs_slope(each.costs):.2f}"
        )
    floors = {f"K = {e.inner_steps}": [v.mean for v in e.floors.by_batch.values()] for e in batches}
    lines += ["", "floor of the squared hypergradient norm"]
    lines += [_row("|B|", batches[0].floors.by_batch), *(_row(*row) for row in floors.items())]
    for what, found in undercut.items():
        lines += ["", f"last squared hypergradient norm against {what}", _row("", found["warm"])]
        lines += [_row(f"{start} start", row.values()) for start, row in found.items()]
    return "\n".join(lines)


def _row(name: str, values: Iterable[float]) -> str:
    cells = (f"{v:9d}" if isinstance(v, int) else f"{v:9.1e}" for v in values)
    return f"{name:12}" + " ".join(cells)


def _result(
    plan: Plan, all_tasks: Deterministic, batches: Sequence[Stochastic]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "K_0": plan.bounds.inner_steps,
        "N_0": plan.bounds.cg_steps,
        "inner_lr": plan.bounds.inner_lr,
        "inverse_L_F": plan.inverse_l_f,
    }
    slopes = {
        "slope_average_against_T": all_tasks.slope,
        "slope_evaluations_all_tasks": all_tasks.costs_slope,
        **{f"slope_floor_K{each.inner_steps}": each.floors.slope for each in batches},
    }
    for name, value in slopes.items():
        result |= {name: value.mean, f"{name}_half_width": value.half_width}
    return result | {f"slope_evaluations_K{e.inner_steps}": costs_slope(e.costs) for e in batches}


@ex.automain
@within_limits()
def convergence(_run: Any, output: str) -> dict[str, Any]:
    """Print the slopes; returns them with their half widths of 95 % intervals."""
    c = ConvergenceSettings.of(_run.config)
    use_threads(c.threads)
    picture = folder_of(_run, output) / "convergence.png"
    plan = Plan.of(c)
    with tqdm(total=plan.total(), desc="outer iterations", mininterval=1.0) as bar:
        all_tasks = deterministic(plan, bar.update)
        _record_theorem_2(_run, all_tasks)
        undercut = {w: around_bounds(plan, w, bar.update) for w in ("inner_steps", "cg_steps")}
        for what, found in undercut.items():
            for start, by_steps in found.items():
                for steps, value in by_steps.items():
                    record(_run, {f"convergence/{what}/{start}": value}, steps)
        batches = []
        for multiple in c.stochastic_inner:
            inner_steps = max(1, round(multiple * plan.bounds.inner_steps))
            batches.append(stochastic(plan, inner_steps, bar.update))
            _record_theorem_1(_run, batches[-1])
    print(_text(plan, all_tasks, batches, undercut))
    drawing = draw_convergence(Findings(
        [dict(enumerate(curve, 1)) for curve in all_tasks.averages],
        [dict(enumerate(norms, 1)) for norms in all_tasks.norms],
        all_tasks.slope,
        {each.inner_steps: each.floors for each in batches},
        undercut,
        {what: getattr(plan.bounds, what) for what in undercut},
    ))  # fmt: skip
    drawing.savefig(picture, dpi=120)
    _run.add_artifact(picture)
    print(f"\npicture: {picture}")
    return _result(plan, all_tasks, batches)
