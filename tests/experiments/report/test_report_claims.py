"""Claims of docs/reproduction.md recomputed from the recorded runs.

The only thing taken from the report is what it wrote: its CSV files. Everything else here is
arithmetic on the lines of the recorded file.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean

import pytest
from reported_records import Recorded, reported
from reported_records import points as of_run

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "docs" / "records" / "papers_figures.jsonl.gz"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, Path]:
    """The recorded runs, and the report of them."""
    folder = tmp_path_factory.mktemp("claims")
    return reported(RECORDS, ["smoke"], folder), folder / "report"


def points(lines: Recorded, name: str) -> dict[int, float]:
    (line,) = [line for line in lines if name in line["metrics"]]
    return of_run(line, name)


def shown(folder: Path, name: str, **wanted: str) -> dict[str, str]:
    with open(folder / f"{name}.csv", newline="") as file:
        (row,) = [r for r in csv.DictReader(file) if wanted.items() <= r.items()]
    return row


def slope(curve: dict[int, float]) -> float:
    """Least squares through the logarithms, by the normal equations."""
    x, y = [math.log(t) for t in curve], [math.log(v) for v in curve.values()]
    dx = [value - mean(x) for value in x]
    return sum(d * v for d, v in zip(dx, y, strict=True)) / sum(d * d for d in dx)


def test_theorem_2_the_average_falls_as_one_over_t(drawn: tuple[Recorded, Path]) -> None:
    lines, folder = drawn
    slopes = []
    for problem in range(3):
        curve = points(lines, f"convergence/all_tasks/{problem}/average")
        slopes.append(slope({t: value for t, value in curve.items() if t >= 40}))
    row = shown(folder, "convergence_slopes", what="Theorem 2: average against T")
    assert float(row["slope"]) == pytest.approx(mean(slopes), abs=1e-5)
    assert mean(slopes) == pytest.approx(-1, abs=1e-3)


def test_theorem_1_the_floor_falls_as_one_over_the_batch(drawn: tuple[Recorded, Path]) -> None:
    """The recorded floors are means over problems; their slope is within the mean's interval."""
    lines, folder = drawn
    for k in (5, 20, 60):
        floor = points(lines, f"convergence/floor/{k}")
        table = shown(folder, "convergence_floors", K=str(k))
        assert {b: float(table[f"B_{b}"]) for b in floor} == floor
        row = shown(folder, "convergence_slopes", what=f"Theorem 1: floor against |B|, K = {k}")
        assert abs(slope(floor) - float(row["slope"])) < float(row["half_width"])


@pytest.mark.parametrize(("size", "cg", "ahead"), [(5, 5, 10), (20, 5, 6), (20, 10, 8)])
def test_imaml_errs_less_than_maml_at_equal_steps(
    size: int, cg: int, ahead: int, drawn: tuple[Recorded, Path]
) -> None:
    """At so many of the ten K, the smallest ones."""
    lines, folder = drawn
    name = f"regression_{size}"
    ours = points(lines, f"hypergradient/{name}/imaml_cg{cg}")
    theirs = points(lines, f"hypergradient/{name}/maml")
    below = [k for k in sorted(ours) if ours[k] < theirs[k]]
    assert below == sorted(ours)[:ahead]
    table = [shown(folder, f"hypergradient_{name}", method=m) for m in (f"imaml_cg{cg}", "maml")]
    reported = [k for k in sorted(ours) if float(table[0][f"K_{k}"]) < float(table[1][f"K_{k}"])]
    assert reported == below
    assert {k: float(table[0][f"K_{k}"]) for k in ours} == ours


def test_more_than_half_of_the_memory_is_saved_as_published_and_nothing_against_caches(
    drawn: tuple[Recorded, Path],
) -> None:
    lines, folder = drawn
    ours = points(lines, "memory/rm_metal/cached")[5]
    for method, variant, more_than_half in (
        ("maml", "as_published", True), ("anil", "as_published", True),
        ("itd_bio", "as_published", True), ("anil", "cached", False), ("itd_bio", "cached", False),
    ):  # fmt: skip
        saved = 1 - ours / points(lines, f"memory/{method}/{variant}")[5]
        row = shown(folder, "memory_yang_peak", method=method, variant=variant.replace("_", " "))
        assert float(row["saved"]) == pytest.approx(saved, abs=1e-12)
        assert (saved > 0.5) == more_than_half and abs(saved) < 0.01 or more_than_half


def test_memory_is_flat_in_the_inner_steps(drawn: tuple[Recorded, Path]) -> None:
    lines, folder = drawn
    for name, table, ours in (
        ("memory/rm_metal/cached", "memory_yang_peak", "rm_metal"),
        ("imaml_memory/imaml/gradient", "memory_rajeswaran_peak", "imaml"),
    ):
        peaks = points(lines, name)
        assert max(peaks) >= 32 * min(peaks) and max(peaks.values()) < 1.01 * min(peaks.values())
        row = shown(folder, table, method=ours, variant=name.rpartition("/")[2])
        assert {k: float(row[f"K_{k}"]) for k in peaks} == peaks


def test_imamls_compute_is_fomamls_plus_a_constant(drawn: tuple[Recorded, Path]) -> None:
    lines, folder = drawn
    seconds = {
        method: points(lines, f"imaml_seconds/{method}/{variant}")
        for method, variant in (
            ("imaml", "gradient"), ("fomaml", "as_published"), ("maml", "as_published")
        )
    }  # fmt: skip
    ours, first_order, maml = seconds["imaml"], seconds["fomaml"], seconds["maml"]
    more = [ours[k] - first_order[k] for k in ours]
    assert max(more) < 1.25 * min(more)
    assert maml[32] / maml[1] > 5 * ours[32] / ours[1]
    assert [k for k in sorted(ours) if ours[k] < maml[k]] == [8, 16, 32]
    row = shown(folder, "memory_rajeswaran_seconds", method="imaml", variant="gradient")
    assert {k: float(row[f"K_{k}"]) for k in ours} == ours
