"""`experiments.papers.differentiating`: tables against what must hold, refusals, the page."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from experiments.papers import differentiating
from experiments.papers.differentiating import CURVES, Way, number, small_network
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
    drawing = differentiating.draw({"head": pd.DataFrame(rows).T})
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
    monkeypatch.setattr(differentiating, "make_tasks", lambda **_: given)
    settings = differentiating.DifferentiatingSettings(parameters=[str(file)])
    with pytest.raises(UserError, match=r"parameters: expected a file .* got .*a.pt: .*; train"):
        next(differentiating.features(settings))


# docs/differentiating.md says what docs/records/differentiating.jsonl.gz holds.

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "differentiating.md").read_text(encoding="utf-8")
RECORD = json.loads(gzip.open(DOCS / "records" / "differentiating.jsonl.gz").readline())
RESULT: dict[str, float] = RECORD["runs"]["result"]


def of(part: str) -> Iterator[tuple[str, str, float]]:
    """Table, row and its error or cosine."""
    for key, value in RESULT.items():
        if key.startswith(f"{part}/"):
            title, _, name = key.removeprefix(f"{part}/").rpartition("/")
            if name.endswith("l2)"):  # Identity(1 / l2)
                title, name = key.removeprefix(f"{part}/").split("/", 1)
            yield title, name, value


def line(start: str) -> str:
    (found,) = (row for row in PAGE.splitlines() if row.startswith(f"| {start} |"))
    return found


def test_every_accuracy_was_kept_and_stands_in_the_table() -> None:
    seen = 0
    for _, name, error in of("features"):
        inner, _, accuracy = name.partition(", ")
        if inner != "Newton":
            fixed, inner = accuracy == "20, 20", inner.replace("gradient", "gradient, adaptive")
            row = line(f"{inner}, {'fixed' if fixed else 'accuracy'} {accuracy}")
            assert f" ms, {number(error)} {'(above 1)' if fixed else '('}" in row
            assert fixed or error <= float(accuracy)
            seen += 1
    assert seen == 3 * 2 * 4


def test_the_cosines_of_the_network_are_those_of_the_run() -> None:
    rows = {name: value for _, name, value in of("network")}
    for name, cosine in rows.items():
        assert line(name).split("|")[2].strip() == number(cosine)
    truncated = rows["CG(20, truncated=True)"]
    assert truncated == max(rows.values())


def test_every_system_was_solved_as_accurately_as_asked() -> None:
    errors = [error for _, _, error in of("systems")]
    assert len(errors) == 4 * 3 * 4 and max(errors) <= 1e-2


@pytest.mark.parametrize("way, error", [("conjugate gradient, 1", 0.77), ("one step, 1", 0.77)])
def test_one_step_is_one_step_of_conjugate_gradient(way: str, error: float) -> None:
    found = {name: value for title, name, value in of("time") if title == "head"}
    assert found[way] == pytest.approx(error, abs=0.005)
    assert f"({error} and {error} on the head)" in PAGE


def test_perturbed_is_as_exact_for_more_time() -> None:
    """The figures of the picture's own record."""
    again = json.loads(gzip.open(DOCS / "records" / "differentiating_time.jsonl.gz").readline())
    result, ratios = again["runs"]["result"], []
    times = {name: series["values"][0] for name, series in again["metrics"].items()}
    for problem, error in (("head", "3e-8"), ("network", "4e-9")):
        found = result[f"time/{problem}/perturbed, 80"]
        assert f"{found:.0e}".replace("e-0", "e-") == error and error in PAGE
        perturbed, cg = (times[f"time/{problem}/{way}, 80/ms"]
                         for way in ("perturbed", "conjugate gradient"))  # fmt: skip
        ratios.append(perturbed / cg)
    assert 5 < min(ratios) < max(ratios) < 7 and "five to seven times the time" in PAGE
