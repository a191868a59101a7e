"""The convergence experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator
from tqdm import tqdm

from experiments.ingredients.model import use_threads, within_limits
from experiments.papers.convergence.parts import (
    Bounds,
    Deterministic,
    Plan,
    Stochastic,
    Undercut,
    around_bounds,
    bounds_of,
    deterministic,
    log_spaced,
    stochastic,
)
from experiments.papers.convergence.problem import make_tasks
from experiments.report.paper_figures import Findings, Floors, draw_convergence
from experiments.report.paper_figures import show_mean as show
from experiments.tracking import TrackedExperiment, record
from experiments.tracking.config import (
    MOST,
    Count,
    Counts,
    NotNegative,
    Positive,
    RunSettings,
    Seed,
    Text,
    Threads,
)
from experiments.training.outcome import new_folder

LENGTHS = ("iterations", "stochastic_iterations", "bound_iterations")
Length = Annotated[int, Field(ge=20, le=MOST)]  # for a slope
Several = Annotated[int, Field(ge=2, le=MOST)]  # for an interval


class ConvergenceSettings(RunSettings):
    """The settings of this experiment."""

    problems: Several = 3  # drawn anew, for the confidence of the slopes
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
    stochastic_inner: Annotated[list[Positive], Field(strict=False, min_length=1)] = [
        0.25, 1.0, 3.0,
    ]  # fmt: skip
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of the problems
    output: Text = "runs"  # the folder of the picture

    @model_validator(mode="after")
    def _fit_together(self) -> ConvergenceSettings:
        if len(set(self.batches)) < 2:
            raise ValueError(
                f"batches: expected two different ones at least, got {self.batches}; one has no "
                "slope"
            )
        if self.theta_size > self.phi_size:
            raise ValueError(
                f"theta_size: expected at most phi_size={self.phi_size}, got {self.theta_size}; "
                "raise phi_size"
            )
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


def _plan(c: Mapping[str, Any]) -> Plan:
    sizes = (c["tasks"], c["theta_size"], c["phi_size"])
    shape = (c["condition"], c["bend"], c["strength"], c["spread"])
    made = [make_tasks(*sizes, *shape, 1000 * c["seed"] + i) for i in range(c["problems"])]
    bounds = bounds_of([tasks.constants() for tasks in made], c["phi_size"])
    return Plan(made, bounds, c["meta_lr"], *(c[name] for name in LENGTHS), c["batches"],
                c["stochastic_inner"])  # fmt: skip


def _record_theorem_2(run: Any, found: Deterministic) -> None:
    for number, (curve, norms) in enumerate(zip(found.averages, found.norms, strict=True)):
        name = f"convergence/all_tasks/{number}"
        for t in log_spaced(len(curve)):
            record(run, {f"{name}/average": curve[t - 1], f"{name}/last": norms[t - 1]}, t)
    for cost in found.evaluations:
        record(run, {"convergence/evaluations/all_tasks": cost.evaluations},
               round(1 / cost.epsilon))  # fmt: skip


def _record_theorem_1(run: Any, found: Stochastic) -> None:
    name = f"convergence/floor/{found.inner_steps}"
    for batch, value in found.floors.items():
        record(run, {name: value.mean, f"{name}/half_width": value.half_width}, batch)
    for cost in found.costs:
        record(run, {f"convergence/evaluations/batches/{found.inner_steps}": cost.evaluations},
               round(1 / cost.epsilon))  # fmt: skip


def _record_undercut(run: Any, what: str, found: Undercut) -> None:
    for start, by_steps in found.items():
        for steps, value in by_steps.items():
            record(run, {f"convergence/{what}/{start}": value.mean}, steps)


def _text(
    bounds: Bounds, all_tasks: Deterministic, batches: Sequence[Stochastic],
    undercut: Mapping[str, Undercut],
) -> str:  # fmt: skip
    """The tables."""
    lines = [
        "",
        f"K_0 = {bounds.inner_steps}, N_0 = {bounds.cg_steps} at lambda_phi = 1 / l_g = "
        f"{bounds.inner_lr:.4f}; 1 / L_F = {bounds.meta_lr:.4f}",
        "",
        f"Theorem 2    average against T        slope {show(all_tasks.slope)} (claimed -1)",
        f"Corollary 1  evaluations to 1/epsilon  slope {show(all_tasks.evaluations_slope)} "
        "(claimed 1), all tasks",
    ]
    for each in batches:
        lines.append(
            f"Theorem 1    floor against |B|       slope {show(each.slope)} (claimed -1), "
            f"K = {each.inner_steps}; evaluations to 1/epsilon, best |B|: {each.costs_slope:.2f}"
        )
    lines += ["", "floor of the squared hypergradient norm", _row("|B|", batches[0].floors)]
    lines += [_row(f"K = {e.inner_steps}", [v.mean for v in e.floors.values()]) for e in batches]
    for what, found in undercut.items():
        lines += ["", f"last squared hypergradient norm against {what}"]
        lines.append(_row("", next(iter(found.values()))))
        lines += [_row(f"{s} start", [v.mean for v in f.values()]) for s, f in found.items()]
    return "\n".join(lines)


def _row(name: str, values: Any) -> str:
    cells = (f"{v:9d}" if isinstance(v, int) else f"{v:9.1e}" for v in values)
    return f"{name:12}" + " ".join(cells)


def _result(
    bounds: Bounds, all_tasks: Deterministic, batches: Sequence[Stochastic]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "K_0": bounds.inner_steps,
        "N_0": bounds.cg_steps,
        "inner_lr": bounds.inner_lr,
        "inverse_L_F": bounds.meta_lr,
    }
    slopes = {
        "slope_average_against_T": all_tasks.slope,
        "slope_evaluations_all_tasks": all_tasks.evaluations_slope,
        **{f"slope_floor_K{each.inner_steps}": each.slope for each in batches},
    }
    for name, value in slopes.items():
        result |= {name: value.mean, f"{name}_half_width": value.half_width}
    return result | {f"slope_evaluations_K{e.inner_steps}": e.costs_slope for e in batches}


def _findings(
    bounds: Bounds, all_tasks: Deterministic, batches: Sequence[Stochastic],
    undercut: Mapping[str, Undercut],
) -> Findings:  # fmt: skip
    """What the picture shows."""
    return Findings(
        [dict(enumerate(curve, 1)) for curve in all_tasks.averages],
        [dict(enumerate(norms, 1)) for norms in all_tasks.norms],
        all_tasks.slope,
        {each.inner_steps: Floors(each.floors, each.slope) for each in batches},
        {what: {start: {n: value.mean for n, value in by_steps.items()}
                for start, by_steps in found.items()} for what, found in undercut.items()},
        {what: getattr(bounds, what) for what in undercut},
    )  # fmt: skip


@ex.automain
@within_limits()
def convergence(
    _run: Any, _config: Mapping[str, Any], threads: int, output: str
) -> dict[str, Any]:
    """Print the slopes; returns them with their half widths of 95 % intervals."""
    use_threads(threads)
    picture = new_folder(_run, output) / "convergence.png"
    plan = _plan(_config)
    with tqdm(total=plan.total(), desc="outer iterations", mininterval=1.0) as bar:
        all_tasks = deterministic(plan, bar.update)
        _record_theorem_2(_run, all_tasks)
        undercut = {w: around_bounds(plan, w, bar.update) for w in ("inner_steps", "cg_steps")}
        for what, found in undercut.items():
            _record_undercut(_run, what, found)
        batches = [stochastic(plan, k, bar.update) for k in plan.stochastic_inner_steps()]
        for each in batches:
            _record_theorem_1(_run, each)
    print(_text(plan.bounds, all_tasks, batches, undercut))
    drawing = draw_convergence(_findings(plan.bounds, all_tasks, batches, undercut))
    drawing.savefig(picture, dpi=120)
    _run.add_artifact(picture)
    print(f"\npicture: {picture}")
    return _result(plan.bounds, all_tasks, batches)
