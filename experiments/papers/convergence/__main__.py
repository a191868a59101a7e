"""The convergence experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import math
from typing import Any

from tqdm import tqdm

from experiments.ingredients.model import use_threads, within_limits
from experiments.papers import Points
from experiments.papers.convergence.parts import (
    ConvergenceSettings,
    Plan,
    around_bounds,
    theorem_1,
    theorem_2,
)
from experiments.report.paper_figures import STEPS, draw_convergence, show_slope
from experiments.report.papers import CLAIMED
from experiments.tracking import TrackedExperiment
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


TABLES = {
    r"convergence/floor/(\d+)": "floor of the squared hypergradient norm, by K, against |B|",
    **{f"convergence/{what}/(warm|cold)": "last squared hypergradient norm from a warm and a cold"
       f" start, against {name}" for what, name in STEPS.items()},
}  # fmt: skip


@ex.automain
@within_limits()
def convergence(_run: Any, output: str) -> dict[str, Any]:
    """Print the slopes; returns them with their half widths of 95 % intervals."""
    c = ConvergenceSettings.of(_run.config)
    use_threads(c.threads)
    picture = folder_of(_run, output) / "convergence.png"
    plan, points = Plan.of(c), Points(_run)
    k_0 = plan.bounds.inner_steps
    result: dict[str, Any] = {"K_0": k_0, "N_0": plan.bounds.cg_steps,
                              "inner_lr": plan.bounds.inner_lr, "inverse_L_F": plan.inverse_l_f}
    with tqdm(total=plan.total(), desc="outer iterations", mininterval=1.0) as bar:
        slopes = theorem_2(plan, points, bar.update)
        around_bounds(plan, points, bar.update)
        for multiple in c.stochastic_inner:
            slopes |= theorem_1(plan, points, max(1, round(multiple * k_0)), bar.update)
    for name, (mean, half_width, _) in slopes.items():
        result[f"slope_{name}"] = mean
        if math.isfinite(half_width):
            result[f"slope_{name}_half_width"] = half_width
    print(f"\nK_0 = {k_0}, N_0 = {plan.bounds.cg_steps} at lambda_phi = 1 / l_g ="
          f" {plan.bounds.inner_lr:.4f}; 1 / L_F = {plan.inverse_l_f:.4f}\n")  # fmt: skip
    for name in slopes:
        kind, _, k = name.partition("_K")
        claimed, what = CLAIMED[kind]
        print(f"{what + k:64} slope {show_slope(result, name)} (claimed {claimed})")
    for pattern, title in TABLES.items():
        print(points.text(title, pattern, ".1e"))
    draw_convergence(points.metrics, result).savefig(picture, dpi=120)
    _run.add_artifact(picture)
    print(f"\npicture: {picture}")
    return result
