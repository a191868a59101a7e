"""The papers' commands: what they record, draw and return, and what they refuse in one line."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from experiments.papers.memory import RAJESWARAN, YANG
from experiments.tracking import UserError
from experiments.tracking.values import CheckedMetrics

Points = dict[tuple[str, int], float]
SMALL: dict[str, dict[str, Any]] = {
    "memory": {
        "hidden": 8, "pixels": 16, "ways": 3, "shots": 2, "queries": 2, "inner_steps": [1, 5],
        "imaml_ways": 3, "imaml_pixels": 16, "imaml_inner_steps": [1, 2], "repetitions": 1,
    },
    "hypergradient": {"inner_steps": [1, 30], "regression_sizes": [4], "problems": 1},
    "convergence": {
        "problems": 2, "tasks": 4, "theta_size": 3, "phi_size": 6, "condition": 3.0,
        "iterations": 20, "stochastic_iterations": 20, "bound_iterations": 20,
        "batches": [1, 16], "stochastic_inner": [1.0],
    },
    "differentiating": {"parts": ["systems"], "width": 40, "samples": 15, "conditions": [100.0]},
}  # fmt: skip


def run(name: str, **changes: Any) -> dict[str, float]:
    module = f"experiments.papers.{name}" + ".__main__" * (name == "convergence")
    options = {"--unobserved": True, "--loglevel": "ERROR", "--name": "mine"}
    ex = importlib.import_module(module).ex
    return ex.run(config_updates=changes, named_configs=["quick"], options=options).result


def check_memory(points: Points, result: dict[str, float]) -> None:
    for prefix, methods, k in (("", YANG, 5), ("imaml_", RAJESWARAN, 2)):
        for name in methods:
            assert points[f"{prefix}memory/{name}", k] > 0 < points[f"{prefix}seconds/{name}", k]
        assert points[f"{prefix}memory/supervised", 0] > 0
    assert points["memory/anil/as_published", 5] > 2 * points["memory/rm_metal/cached", 5]
    assert result["process_peak_bytes"] > points["memory/anil/as_published", 5]


def check_hypergradient(points: Points, result: dict[str, float]) -> None:
    for name in ("regression_4/imaml_cg5", "regression_4/maml", "logistic/rm_metal_cg20",
                 "logistic/itd_bio"):  # fmt: skip
        first, last = (points[f"hypergradient/{name}", k] for k in (1, 30))
        assert 0 < last < first
        assert result[name] == last


def check_convergence(points: Points, result: dict[str, float]) -> None:
    k_0, n_0 = result["K_0"], result["N_0"]
    assert k_0 > 1 and math.isfinite(result["slope_average_against_T"])
    assert points["convergence/all_tasks/1/average", 20] > 0
    assert points[f"convergence/floor/{k_0}", 1] > points[f"convergence/floor/{k_0}", 16] > 0
    assert {("convergence/inner_steps/cold", 1), ("convergence/cg_steps/warm", n_0)} <= set(points)


def check_differentiating(points: Points, result: dict[str, float]) -> None:
    """The systems are solved as accurately as asked, with fewer products where preconditioned."""
    assert len(result) == 4 * 4 and max(result.values()) <= 1e-2
    products = {name: value for (name, _), value in points.items() if name.endswith("products")}
    preconditioned = [name for name in products if "/Kronecker/" in name]
    assert len(preconditioned) == 4
    for name in preconditioned:
        assert products[name] <= products[name.replace("Kronecker", "CG")]
        assert products[name] == 1 or "squared" not in name


PICTURES = {"memory": {"memory_yang.png", "memory_rajeswaran.png"}, "differentiating": set[str]()}
CHECKS = {"memory": check_memory, "hypergradient": check_hypergradient,
          "convergence": check_convergence, "differentiating": check_differentiating}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_a_command_records_every_curve(name: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    points: Points = {}
    keep = staticmethod(lambda name, value, step, now: points.update({(name, step): value}))
    monkeypatch.setattr(CheckedMetrics, "sink", keep)
    result = run(name, **SMALL[name], output=str(tmp_path))
    CHECKS[name](points, result)
    pictures = {path.name: path.stat().st_size for path in tmp_path.glob("*/*")}  # and no lock
    assert set(pictures) == PICTURES.get(name, {f"{name}.png"})
    assert all(size > 20_000 for size in pictures.values())


NOT_FINITE = "numbers: expected finite ones, got .*; choose less extreme"


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("memory", {"inner_steps": []}, "inner_steps: expected a list of at least one, each"),
    ("memory", {"imaml_pixels": 8}, "imaml_pixels: expected a whole number from 16 to"),
    ("memory", {"limit_gib": 0.0}, "limit_gib: expected a finite number above 0"),
    ("memory", {"device": "cuba"}, "device: expected auto, cpu or a GPU that is there"),
    ("hypergradient", {"spread": 0.5}, "spread: .* at least 1, got 0.5; try 1000.0"),
    ("hypergradient", {"spread": 1e308}, NOT_FINITE),
    ("hypergradient", {"ways": 1}, "numbers: .* got an exact hypergradient of size 0; choose"),
    ("hypergradient", {"output": "/dev/null/runs"}, "output: .* got .* .Not a directory"),
    ("convergence", {"batches": [2, 2]}, "batches: expected two different ones at least"),
    ("convergence", {"condition": 1e308}, NOT_FINITE),
    ("convergence", {"strength": 1e-200}, "numbers: .* hypergradient of 0 at the start"),
    ("convergence", {"theta_size": 40}, "theta_size: expected at most phi_size=12, got 40"),
    ("differentiating", {"samples": 1}, "samples: expected a whole number from 5 to"),
    ("differentiating", {"conditions": []}, "conditions: expected a list of at least one"),
    ("differentiating", {"conditions": [1e300]}, NOT_FINITE),
    ("differentiating", {"parts": []}, "parts: expected a list of at least one, each one of"),
    ("differentiating", {"parts": ["features"]}, "parameters: expected files .* got none"),
])  # fmt: skip
def test_a_wrong_setting_is_one_line(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(name, **changes)
