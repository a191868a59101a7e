"""The accuracy tables of the docs recomputed from the recorded runs.

Nothing of the report is used but the files it wrote: which run belongs to which method, what its
accuracy was when its budget ended, means, intervals, times and collapses are found again here. The
pages must show what the report writes, line by line.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest
from reported_records import Recorded, points, reported

DOCS = Path(__file__).parents[3] / "docs"
FILES = sorted((DOCS / "records").glob("accuracy_*.jsonl.gz"))
assert FILES, "docs/records holds no accuracy_*.jsonl.gz"
T_975 = {1: 12.706204736, 2: 4.302652730}
"""Student's t for 95 % intervals, by degrees of freedom."""


class Final(NamedTuple):
    """A run that counts in the table.

    Attributes:
        test: accuracy at the end of the budget.
        curve: seconds of training and validation accuracy, in the budget.
    """

    seed: int
    test: float
    curve: list[tuple[float, float]]


Drawn = tuple[dict[str, list[Final]], Path, str]


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.name.partition(".")[0])
def drawn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Drawn:
    """Final runs by method, the report's folder, the benchmark."""
    folder = tmp_path_factory.mktemp("accuracy")
    benchmark = request.param.name.partition(".")[0].removeprefix("accuracy_")
    lines = reported(request.param, ["accuracy", f"benchmark={benchmark}"], folder)
    return finals(lines), folder / "report", benchmark


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
    shown = rows(drawn, "summary")
    for name, runs in drawn[0].items():
        tests = [run.test for run in runs]
        assert len({run.seed for run in runs}) == len(runs)
        assert same(shown[name]["test_mean"], mean(tests)), name
        if len(tests) > 1:
            assert same(shown[name]["test_half_width"], half_width(tests)), name
    missing = {name for name, row in shown.items() if row["seeds"] == "0"}
    assert missing.isdisjoint(drawn[0]) and missing | set(drawn[0]) == set(shown)


def test_the_lead_is_the_mean_of_the_differences_seed_by_seed(drawn: Drawn) -> None:
    shown, ours = rows(drawn, "summary"), {run.seed: run.test for run in drawn[0]["rm_metal"]}
    for name, runs in drawn[0].items():
        leads = [ours[run.seed] - run.test for run in runs if run.seed in ours]
        if name == "rm_metal" or len(leads) < 2:
            continue
        assert same(shown[name]["lead_mean"], mean(leads)), name
        assert same(shown[name]["lead_half_width"], half_width(leads)), name


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
