"""`experiments.papers.differentiating`: its tables against what must hold, and its refusals."""

import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from experiments.papers.differentiating import (
    CURVES,
    DifferentiatingSettings,
    Way,
    draw,
    features,
    number,
    small_network,
)
from experiments.papers.hypergradient import Classification, Problem
from experiments.tracking import UserError

pytestmark = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")


@pytest.mark.parametrize("task", [Classification(3, 4, 6, 0.1, 0), small_network(0)])
def test_every_way_leads_to_the_dense_oracle(task: Problem) -> None:
    """The last budget of those that can get there; one step can not."""
    truth = task.exact()

    def error(way: Way, budget: float) -> float:
        got, milliseconds = way.measured(task, budget)
        assert milliseconds > 0.0
        return float((got - truth).norm() / truth.norm())

    assert error(CURVES["conjugate gradient"], 80) < 1e-6
    assert error(CURVES["preconditioned"], 80) < 1e-6
    assert error(CURVES["accuracy"], 1e-4) < 1e-3
    assert error(CURVES["Neumann"], 300) < error(CURVES["Neumann"], 3)
    assert error(CURVES["one step"], 1) > 0.1


def test_the_picture_has_a_curve_for_each_way() -> None:
    row = {"ms": 1.0, "error": 0.1}
    rows = {f"{name}, {b:g}": row for name, way in CURVES.items() for b in way.budgets}
    drawing = draw({"head": pd.DataFrame(rows).T})
    assert [len(line.get_xdata()) for line in drawing.axes[0].lines] == [
        len(way.budgets) for way in CURVES.values()
    ]
    assert [number(x) for x in (1e30, 150.4, 3.0, 0.0123, math.nan)] == [
        "above 1e5", "150", "3", "0.012", "nan",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, b"x", [1], {"backbone": {"x": torch.zeros(2)}}])
def test_a_file_that_will_not_do_is_one_line(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, none that torch reads, and those of something else."""
    file, given = tmp_path / "a.pt", SimpleNamespace(input_shape=lambda: (3, 32, 32))
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    monkeypatch.setattr("experiments.papers.differentiating.make_tasks", lambda **_: given)
    with pytest.raises(UserError, match=r"parameters: expected a file .* got .*a.pt: .*; train"):
        next(features(DifferentiatingSettings(parameters=[str(file)])))
