"""Tables and claims of the docs recomputed from the recorded runs.

Nothing of the report is used but the files it wrote: which run belongs to which method, what its
accuracy was when its budget ended, means, intervals, times and collapses are found again here. The
pages must show what the report writes, line by line.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest

from experiments.report.__main__ import main as report

DOCS = Path(__file__).parents[3] / "docs"
FILES = sorted((DOCS / "records").glob("accuracy_*.jsonl.gz"))
assert FILES, "docs/records holds no accuracy_*.jsonl.gz"
PAPERS = DOCS / "records" / "papers_figures.jsonl.gz"
T_975 = {1: 12.706204736, 2: 4.302652730}
"""Student's t for 95 % intervals, by degrees of freedom."""

Recorded = list[dict[str, Any]]
"""A file's lines: {"runs": document, "metrics": {name: {"steps": ..., "values": ...}}}."""


class Final(NamedTuple):
    """A run that counts in the table."""

    seed: int
    test: float  # accuracy at the end of the budget
    curve: list[tuple[float, float]]  # seconds of training and validation accuracy, in the budget


Drawn = tuple[dict[str, list[Final]], Path, str]


def reported(records: Path, words: Sequence[str], folder: Path) -> Recorded:
    """The file's lines; the report of the sweep that `words` name is in the folder."""
    assert report([*words, "--records", str(records), "--output", str(folder)]) == 0
    assert "Not drawn (" not in (folder / "index.html").read_text()
    with gzip.open(records, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def points(line: dict[str, Any], name: str) -> dict[int, float]:
    """A metric of one line by step; empty if the run has none."""
    metric = line["metrics"].get(name, {"steps": [], "values": []})
    return dict(zip(metric["steps"], metric["values"], strict=True))


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.name.partition(".")[0])
def drawn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Drawn:
    """Final runs by method, the report's folder, the benchmark."""
    folder = tmp_path_factory.mktemp("accuracy")
    benchmark = request.param.name.partition(".")[0].removeprefix("accuracy_")
    lines = reported(request.param, ["accuracy", f"benchmark={benchmark}"], folder)
    return finals(lines), folder, benchmark


def finals(lines: Recorded) -> dict[str, list[Final]]:
    """The runs with the largest budget are the final ones; the grid's have half of it.

    Of those that ran again with other code the newest counts.
    """
    complete = [line for line in lines if line["runs"]["status"] == "COMPLETED"]
    largest = max(line["runs"]["config"]["budget"] for line in complete)
    found: dict[str, dict[int, Final]] = defaultdict(dict)
    for line in sorted(complete, key=lambda line: line["runs"]["stop_time"]):
        config = line["runs"]["config"]
        name = "_".join(filter(None, (config["algorithm"]["name"], config["algorithm"]["variant"])))
        if config["budget"] == largest:
            found[name][config["seed"]] = final(line, largest)
    return {name: list(by_seed.values()) for name, by_seed in found.items()}


def final(line: dict[str, Any], budget: float) -> Final:
    run = line["runs"]
    spent = [step for step, s in points(line, "test/training_seconds").items() if s >= budget]
    test = points(line, "test/accuracy")[min(spent)] if spent else run["result"]["test_accuracy"]
    scores = points(line, "validation/accuracy")
    seconds = points(line, "validation/training_seconds")
    curve = sorted((seconds[step], scores[step]) for step in scores)
    late = [n for n, (at, _) in enumerate(curve) if at >= budget]
    return Final(run["config"]["seed"], test, curve[: late[0] + 1] if late else curve)


def rows(drawn: Drawn, table: str) -> dict[str, dict[str, str]]:
    _, folder, benchmark = drawn
    with open(folder / f"{table}_accuracy_{benchmark}.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def same(shown: str, value: float) -> bool:
    return math.isclose(float(shown), value, rel_tol=1e-9, abs_tol=1e-12)


def half_width(values: list[float]) -> float:
    return T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def test_accuracies_and_their_intervals(drawn: Drawn) -> None:
    """The lead is the mean of the differences seed by seed."""
    shown, ours = rows(drawn, "summary"), {run.seed: run.test for run in drawn[0]["rm_metal"]}
    for name, runs in drawn[0].items():
        tests = [run.test for run in runs]
        leads = [ours[run.seed] - run.test for run in runs if run.seed in ours]
        values = {"test": tests} if name == "rm_metal" else {"test": tests, "lead": leads}
        assert len({run.seed for run in runs}) == len(runs)
        for what, of_seeds in values.items():
            assert same(shown[name][f"{what}_mean"], mean(of_seeds)), name
            if len(of_seeds) > 1:
                assert same(shown[name][f"{what}_half_width"], half_width(of_seeds)), name
    missing = {name for name, row in shown.items() if row["seeds"] == "0"}
    assert missing.isdisjoint(drawn[0]) and missing | set(drawn[0]) == set(shown)


def test_seconds_to_nine_tenths_of_the_best(drawn: Drawn) -> None:
    best = {
        name: mean(max(score for _, score in run.curve) for run in runs)
        for name, runs in drawn[0].items()
    }
    threshold = 0.9 * max(best.values())
    shown = rows(drawn, "time")
    for name, runs in drawn[0].items():
        reached = [[at for at, score in run.curve if score >= threshold] for run in runs]
        first = [min(times) for times in reached if times]
        assert same(shown[name]["threshold"], threshold)
        assert int(shown[name]["reached"]) == len(first), name
        assert not first or same(shown[name]["seconds"], mean(first)), name


def test_collapses(drawn: Drawn) -> None:
    """A validation more than 10 points below an earlier one, in the budget."""
    shown = rows(drawn, "summary")
    for name, runs in drawn[0].items():
        fell = sum(
            any(later < score - 0.1 for n, (_, score) in enumerate(run.curve)
                for _, later in run.curve[n + 1:])
            for run in runs
        )  # fmt: skip
        assert int(shown[name]["collapsed"]) == fell, name


def test_the_table_of_all_benchmarks(drawn: Drawn) -> None:
    """Means with intervals over seeds; a star where rm_metal leads beyond the interval."""
    runs, _, benchmark = drawn
    ours = {run.seed: run.test for run in runs["rm_metal"]}
    found = {}
    for name, theirs in runs.items():
        tests, leads = [run.test for run in theirs], [ours[run.seed] - run.test for run in theirs]
        led = mean(leads) > half_width(leads)
        found[name] = f"{100 * mean(tests):.1f} ± {100 * half_width(tests):.1f}" + " *" * led
    shown = column(DOCS / "reproduction.md", benchmark)
    assert found == {name: cell for name, cell in shown.items() if cell != "missing"}


def column(page: Path, name: str) -> dict[str, str]:
    """Of the page's table that has a column of this name: its cells by those of the first."""
    lines = page.read_text().splitlines()
    (top,) = (n for n, line in enumerate(lines) if line[:9] == "| method " and name in cells(line))
    below = [cells(line) for line in takewhile(lambda line: line[:1] == "|", lines[top + 2 :])]
    return {row[0]: row[cells(lines[top]).index(name)] for row in below}


def cells(line: str) -> list[str]:
    """Without the report's bold."""
    return [cell.strip().removeprefix("**").removesuffix("**") for cell in line.split("|")[1:-1]]


def table_lines(page: Path) -> list[list[str]]:
    """The cells of every line of a table but the one under the head."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [cells(line) for line in lines if line.strip("|-: ")]


@pytest.mark.parametrize("table", ["summary", "time"])
def test_the_page_shows_the_report_s_tables(drawn: Drawn, table: str) -> None:
    _, folder, benchmark = drawn
    wanted = table_lines(folder / f"{table}_accuracy_{benchmark}.md")
    shown = table_lines(DOCS / "reproduction_accuracy.md")
    assert any(shown[n : n + len(wanted)] == wanted for n in range(len(shown))), wanted


# The papers' figures

Papers = tuple[Recorded, Path]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """The recorded runs, and the report of them."""
    folder = tmp_path_factory.mktemp("claims")
    return reported(PAPERS, ["smoke"], folder), folder


def of_one(lines: Recorded, name: str) -> dict[int, float]:
    (line,) = [line for line in lines if name in line["metrics"]]
    return points(line, name)


def shown(folder: Path, name: str, **wanted: str) -> dict[str, str]:
    with open(folder / f"{name}.csv", newline="") as file:
        (row,) = [r for r in csv.DictReader(file) if wanted.items() <= r.items()]
    return row


def slope(curve: dict[int, float]) -> float:
    """Least squares through the logarithms, by the normal equations."""
    x, y = [math.log(t) for t in curve], [math.log(v) for v in curve.values()]
    dx = [value - mean(x) for value in x]
    return sum(d * v for d, v in zip(dx, y, strict=True)) / sum(d * d for d in dx)


def test_theorem_2_the_average_falls_as_one_over_t(papers: Papers) -> None:
    lines, folder = papers
    slopes = []
    for problem in range(3):
        curve = of_one(lines, f"convergence/all_tasks/{problem}/average")
        slopes.append(slope({t: value for t, value in curve.items() if t >= 40}))
    row = shown(folder, "convergence_slopes", what="Theorem 2: average against T")
    assert float(row["slope"]) == pytest.approx(mean(slopes), abs=1e-5)
    assert mean(slopes) == pytest.approx(-1, abs=1e-3)


def test_theorem_1_the_floor_falls_as_one_over_the_batch(papers: Papers) -> None:
    """The recorded floors are means over problems; their slope is within the mean's interval."""
    lines, folder = papers
    for k in (5, 20, 60):
        floor = of_one(lines, f"convergence/floor/{k}")
        table = shown(folder, "convergence_floors", K=str(k))
        assert {b: float(table[f"B_{b}"]) for b in floor} == floor
        row = shown(folder, "convergence_slopes", what=f"Theorem 1: floor against |B|, K = {k}")
        assert abs(slope(floor) - float(row["slope"])) < float(row["half_width"])


@pytest.mark.parametrize(("size", "cg", "ahead"), [(5, 5, 10), (20, 5, 6), (20, 10, 8)])
def test_imaml_errs_less_than_maml_at_equal_steps(
    size: int, cg: int, ahead: int, papers: Papers
) -> None:
    """At so many of the ten K, the smallest ones."""
    lines, folder = papers
    name = f"regression_{size}"
    ours = of_one(lines, f"hypergradient/{name}/imaml_cg{cg}")
    theirs = of_one(lines, f"hypergradient/{name}/maml")
    below = [k for k in sorted(ours) if ours[k] < theirs[k]]
    assert below == sorted(ours)[:ahead]
    table = [shown(folder, f"hypergradient_{name}", method=m) for m in (f"imaml_cg{cg}", "maml")]
    reported = [k for k in sorted(ours) if float(table[0][f"K_{k}"]) < float(table[1][f"K_{k}"])]
    assert reported == below
    assert {k: float(table[0][f"K_{k}"]) for k in ours} == ours


def test_more_than_half_of_the_memory_is_saved_as_published_and_nothing_against_caches(
    papers: Papers,
) -> None:
    lines, folder = papers
    ours = of_one(lines, "memory/rm_metal/cached")[5]
    for method, variant, more_than_half in (
        ("maml", "as_published", True), ("anil", "as_published", True),
        ("itd_bio", "as_published", True), ("anil", "cached", False), ("itd_bio", "cached", False),
    ):  # fmt: skip
        saved = 1 - ours / of_one(lines, f"memory/{method}/{variant}")[5]
        row = shown(folder, "memory_yang_peak", method=method, variant=variant.replace("_", " "))
        assert float(row["saved"]) == pytest.approx(saved, abs=1e-12)
        assert (saved > 0.5) == more_than_half and abs(saved) < 0.01 or more_than_half


def test_memory_is_flat_in_the_inner_steps(papers: Papers) -> None:
    lines, folder = papers
    for name, table, ours in (
        ("memory/rm_metal/cached", "memory_yang_peak", "rm_metal"),
        ("imaml_memory/imaml/gradient", "memory_rajeswaran_peak", "imaml"),
    ):
        peaks = of_one(lines, name)
        assert max(peaks) >= 32 * min(peaks) and max(peaks.values()) < 1.01 * min(peaks.values())
        row = shown(folder, table, method=ours, variant=name.rpartition("/")[2])
        assert {k: float(row[f"K_{k}"]) for k in peaks} == peaks


def test_imamls_compute_is_fomamls_plus_a_constant(papers: Papers) -> None:
    lines, folder = papers
    seconds = {
        method: of_one(lines, f"imaml_seconds/{method}/{variant}")
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
