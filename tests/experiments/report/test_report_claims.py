"""Tables and claims of the docs recomputed from the recorded runs.

Nothing of the report is used but the files it wrote: which run belongs to which method, what its
accuracy was when its budget ended, means, intervals, times and collapses are found again here. The
pages must show what the report writes, line by line.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from statistics import linear_regression, mean, stdev
from typing import Any, NamedTuple

import pytest
from pytest import approx
from report_runs import markdown, rows
from sacred.utils import iterate_flattened

from experiments.report.__main__ import main as report

DOCS = Path(__file__).parents[3] / "docs"
SWEEPS = ("accuracy", "yang_table1", "yang_quarter", "rajeswaran_table2")
FILES = [file for name in SWEEPS for file in (DOCS / "records").glob(f"{name}_*.jsonl.gz")]
AGAIN = DOCS / "records" / "again_yang_table1_cifarfs.jsonl.gz"  # whose seconds do not compare
OTHERS = [file for file in FILES if file.name.startswith("accuracy_")]  # than the papers' data
FILES_OF = {"accuracy": OTHERS, "papers": [file for file in FILES if file not in OTHERS]}
assert all(FILES_OF.values()), "docs/records holds no runs of the sweeps"
T_975 = {1: 12.706204736, 2: 4.302652730}
"""Student's t for 95 % intervals, by degrees of freedom."""
NAMES = {"rm_metal": "ImplicitCGHead", "imaml_gd": "ImplicitMAML", "imaml_hf": "ImplicitMAML_HF"}
"""Of today, by those of the records."""

Recorded = list[dict[str, Any]]
"""A file's lines: {"runs": document, "metrics": {name: {"steps": ..., "values": ...}}}."""


class Final(NamedTuple):
    """A run that counts in the table."""

    seed: int
    result: dict[str, float]
    test: float  # accuracy at the end of the budget
    curve: list[tuple[float, float]]  # seconds of training and validation accuracy, in the budget


class Drawn(NamedTuple):
    """Final runs by method, the report's folder, the sweep and its benchmark."""

    finals: dict[str, list[Final]]
    folder: Path
    sweep: str
    benchmark: str

    def rows(self, table: str) -> dict[str, dict[str, str]]:
        name = f"{table}_{self.sweep}_{self.benchmark}"
        return {row["method"]: row for row in rows(self.folder, name)}


def reported(records: Path, words: Sequence[str], folder: Path) -> Recorded:
    """The file's lines; the report of the sweep that `words` name is in the folder."""
    assert report([*words, "--records", str(records), "--output", str(folder)]) == 0
    assert "Not drawn (" not in (folder / "index.html").read_text()
    return recorded(records)


def recorded(records: Path) -> Recorded:
    return [json.loads(line) for line in gzip.decompress(records.read_bytes()).splitlines()]


def points(line: dict[str, Any], name: str) -> dict[int, float]:
    """A metric of one line by step; empty if the run has none."""
    metric = line["metrics"].get(name, {"steps": [], "values": []})
    return dict(zip(metric["steps"], metric["values"], strict=True))


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.name.partition(".")[0])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """One file's runs, and the report of them."""
    folder, stem = tmp_path_factory.mktemp("accuracy"), request.param.name.partition(".")[0]
    sweep = next(name for name in SWEEPS if stem.startswith(f"{name}_"))
    benchmark = stem.removeprefix(f"{sweep}_")
    words = [sweep, f"benchmark={benchmark}"]
    words += ["model.precision=bfloat16"] * (benchmark in ("fc100", "mini_imagenet_part"))
    found = finals(reported(request.param, words, folder), sweep)
    return Drawn(found, folder, sweep, benchmark)


def finals(lines: Recorded, sweep: str) -> dict[str, list[Final]]:
    """The runs that count, by method.

    They have the largest budget, or are not cut short. Of those that ran again with other code the
    newest counts.
    """
    complete = [line for line in lines if line["runs"]["status"] == "COMPLETED"]
    budgets = [line["runs"]["config"]["budget"] or math.inf for line in complete]
    found: dict[str, dict[int, Final]] = defaultdict(dict)
    for line in sorted(complete, key=lambda line: line["runs"]["stop_time"]):
        config = line["runs"]["config"]
        budget = config["budget"] or math.inf
        if budget == max(budgets) if sweep == "accuracy" else config["early_stopping"]:
            found[method_of(config, sweep)][config["seed"]] = final(line, budget)
    return {name: list(of.values()) for name, of in found.items()}


def method_of(config: dict[str, Any], sweep: str) -> str:
    """The row's name, from what the run was configured with."""
    algorithm = config["algorithm"]
    name, variant = algorithm["name"], algorithm["variant"]
    if variant == "paper":
        return "as_printed" + "_adam" * (config["meta_optimizer"] == "adam")
    if sweep == "yang_table1" and name == "maml":
        return "maml_printed"
    return variant or NAMES.get(name, name)


def final(line: dict[str, Any], budget: float) -> Final:
    run = line["runs"]
    spent = [step for step, s in points(line, "test/training_seconds").items() if s >= budget]
    test = points(line, "test/accuracy")[min(spent)] if spent else run["result"]["test_accuracy"]
    scores = points(line, "validation/accuracy")
    seconds = points(line, "validation/training_seconds")
    curve = sorted((seconds[step], scores[step]) for step in scores)
    late = [n for n, (at, _) in enumerate(curve) if at >= budget]
    shown = curve[: late[0] + 1] if late else curve
    return Final(run["config"]["seed"], run["result"], test, shown)


def half_width(values: list[float]) -> float:
    return T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def test_accuracies_and_their_intervals(drawn: Drawn) -> None:
    """The first row's lead is the mean of the differences seed by seed. In the table of all
    benchmarks: means with intervals, a star where that lead is beyond the interval."""
    shown, overall = drawn.rows("summary"), {}

    def of(name: str) -> dict[str, dict[int, float]]:
        """By seed: at the end of the budget, its half width in the run, at the best validation."""
        runs = drawn.finals[name]
        early = {run.seed: run.result.get("early_stopped_accuracy") for run in runs}
        return {"test": {run.seed: run.test for run in runs},
                "within_run": {run.seed: run.result["test_half_width"] for run in runs},
                "early_stopped": {seed: v for seed, v in early.items() if v is not None}}

    first = next(iter(shown))
    ours = of(first) if first in drawn.finals else {"test": {}, "early_stopped": {}}
    for name, runs in drawn.finals.items():
        values = {what: list(by_seed.values()) for what, by_seed in of(name).items()}
        for lead, what in {"lead": "test", "early_stopped_lead": "early_stopped"}.items():
            values[lead] = [ours[what][seed] - value for seed, value in of(name)[what].items()
                            if seed in ours[what]]
        assert len(values["test"]) == len(runs)
        for what, seeds in values.items():
            if len(seeds) > 1 and (name != first or "lead" not in what):
                row = [float(shown[name][f"{what}_{part}"]) for part in ("mean", "half_width")]
                assert row == approx([mean(seeds), half_width(seeds)], rel=1e-9, abs=1e-12), name
        tests, leads = values["test"], values["lead"]
        overall[name] = f"{100 * mean(tests):.1f}"
        if len(tests) > 1:
            led = " *" * (mean(leads) > half_width(leads))
            overall[name] += f" ± {100 * half_width(tests):.1f}{led}"
    assert set(drawn.finals) == set(shown)
    heading = drawn.benchmark + ", a quarter" * (drawn.sweep == "yang_quarter")
    column = column_of(DOCS / "reproduction.md", heading)
    assert overall == {name: cell for name, cell in column.items() if cell != "–"}


def test_seconds_to_nine_tenths_of_the_best(drawn: Drawn) -> None:
    best = {
        name: mean(max(score for _, score in run.curve) for run in runs)
        for name, runs in drawn.finals.items()
    }
    threshold = 0.9 * max(best.values())
    shown = drawn.rows("time")
    for name, runs in drawn.finals.items():
        reached = [[at for at, score in run.curve if score >= threshold] for run in runs]
        first = [min(times) for times in reached if times]
        assert float(shown[name]["threshold"]) == approx(threshold, rel=1e-9)
        assert int(shown[name]["reached"]) == len(first), name
        assert not first or float(shown[name]["seconds"]) == approx(mean(first), rel=1e-9), name


def test_collapses(drawn: Drawn) -> None:
    """A validation more than 10 points below an earlier one, in the budget."""
    for name, runs in drawn.finals.items():
        assert int(drawn.rows("summary")[name]["collapsed"]) == sum(map(fell, runs)), name


def fell(run: Final) -> bool:
    return any(later < score - 0.1 for n, (_, score) in enumerate(run.curve)
               for _, later in run.curve[n + 1:])  # fmt: skip


@pytest.mark.parametrize("page", ["index.md", "../README.md"])
def test_how_many_collapsed_is_what_home_says(page: str) -> None:
    """Over all data sets."""
    runs: dict[str, list[Final]] = defaultdict(list)
    for file in [*FILES, AGAIN]:
        sweep = next(name for name in SWEEPS if f"{name}_" in file.name)
        for name, of in finals(recorded(file), sweep).items():
            runs[name] += of
    numbers = "none one two three four five six seven eight nine ten eleven twelve".split()
    ours, itd, anil = ((numbers[sum(map(fell, runs[name]))], numbers[len(runs[name])])
                       for name in ("ImplicitCGHead", "itd_bio", "anil"))  # fmt: skip
    text = " ".join((DOCS / page).read_text().split())
    assert re.search(rf"{ours[0].capitalize()} of {ours[1]} runs on five data sets", text)
    assert f"{itd[0]} of {itd[1]} of ITD-BiO's and {anil[0]} of {anil[1]} of ANIL's" in text


@pytest.mark.parametrize("name", ["ImplicitCGHead", "anil", "itd_bio"])
def test_three_seeds_of_cifarfs(name: str) -> None:
    """The first one's settings and code, until the run ended, and the accuracies of the page."""
    first, again = ([line["runs"] for line in recorded(DOCS / "records" / file)
                     if method_of(line["runs"]["config"], "yang_table1") == name
                     and line["runs"]["config"]["early_stopping"]]
                    for file in ("yang_table1_cifarfs.jsonl.gz", AGAIN.name))  # fmt: skip
    own: dict[str, Any] = {"seed": None, "cell": None, "resume": None, "iterations": None}
    (run,) = (run for run in first if run["config"] | own == again[0]["config"] | own)
    runs = [run, *again]
    assert [run["config"]["seed"] for run in runs] == [0, 1, 2]
    for run in again:
        assert run["config"] | own == runs[0]["config"] | own
        assert run["experiment"]["repositories"] == runs[0]["experiment"]["repositories"]
    ended, early = ([100 * run["result"][f"{what}_accuracy"] for run in runs]
                    for what in ("test", "early_stopped"))  # fmt: skip
    shown = [", ".join(f"{value:.1f}" for value in values) for values in (ended, early)]
    shown += [f"{mean(early):.1f} ± {half_width(early):.1f}"]
    shown += [", ".join(f"{run['result']['iterations']:,}" for run in runs)]
    page = DOCS / "reproduction.md"
    columns = ("at the end", "early stopped, by seed", "mean, early stopped", "iterations, by seed")
    assert [column_of(page, column)[name] for column in columns] == shown
    if name == "ImplicitCGHead":
        both = f"{mean(ended):.1f} ± {half_width(ended):.1f} % (95 % between three seeds)"
        assert both in " ".join(page.read_text().split())


def test_how_far_its_peers_are_behind_on_cifarfs() -> None:
    """With theta of the best validation, seed by seed."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in ("yang_table1_cifarfs.jsonl.gz", AGAIN.name):
        for name, runs in finals(recorded(DOCS / "records" / file), "yang_table1").items():
            early = {run.seed: 100 * run.result["early_stopped_accuracy"] for run in runs}
            found[name] |= early
    leads = [[found["ImplicitCGHead"][seed] - found[name][seed] for seed in range(3)]
             for name in ("anil", "itd_bio")]  # fmt: skip
    behind = " and ".join(f"{mean(lead):.1f} ± {half_width(lead):.1f}" for lead in leads)
    text = " ".join((DOCS / "reproduction.md").read_text().split())
    assert f"they are {behind} points behind**, seed by seed" in text


def test_anil_with_the_smaller_outer_step() -> None:
    """Its settings are those of the table's run, stopped once it had fallen like that one."""
    first, (slower,) = (recorded(DOCS / "records" / f"{name}yang_table1_cifarfs.jsonl.gz")
                        for name in ("", "slower_"))  # fmt: skip
    settings, *others = (
        dict(iterate_flattened(line["runs"]["config"])) for line in (slower, *first)
    )
    differ = [{key for key, value in other.items() if settings[key] != value} for other in others]
    assert differ.count({"meta_lr", "cell", "resume", "iterations"}) == 1
    curve = points(slower, "validation/accuracy")
    best = list(accumulate(curve.values(), max))
    pairs = zip(curve.items(), best, strict=True)
    fell_at = next(step for (step, score), top in pairs if score < top - 0.1)
    result = slower["runs"]["result"]
    early = [100 * result[f"early_stopped_{name}"] for name in ("accuracy", "half_width")]
    said = ("With the other outer step of its grid, {}, ANIL collapses after {} (best validation "
            "{:.1f} %; with that theta {:.1f} ± {:.1f} % on the test tasks)")  # fmt: skip
    text = " ".join((DOCS / "reproduction.md").read_text().split())
    assert said.format(settings["meta_lr"], fell_at, 100 * best[-1], *early) in text


def test_a_second_seed_of_fc100() -> None:
    """And its early stopped theta, tested with heads held closer, with one crop and with ten."""
    run, *tests = (line["runs"]
                   for line in recorded(DOCS / "records" / "again_yang_table1_fc100.jsonl.gz"))
    text, result = " ".join((DOCS / "reproduction.md").read_text().split()), run["result"]
    crops = {test["config"]["algorithm"].get("test_crops"): test["result"] for test in tests}
    found = (result["test_accuracy"], result["test_half_width"], result["early_stopped_accuracy"],
             *(crops[n][f"test_{what}"] for n in (None, 10) for what in ("accuracy", "half_width")))
    said = ("a second seed has {:.1f} ± {:.1f} %, early stopped {:.1f}; that theta has {:.1f} ± "
            "{:.1f} % with `test_l2=3`, and {:.1f} ± {:.1f} % with ten crops besides")  # fmt: skip
    assert said.format(*(100 * value for value in found)) in text
    assert all(test["config"]["algorithm"]["test_l2"] == 3 for test in tests)


def test_the_best_by_what_the_test_has() -> None:
    """One run for each number: the training's own test, or one of its weights alone."""
    found = {}
    for name in ("cifarfs", "fc100"):
        for line in recorded(DOCS / "records" / f"best_{name}.jsonl.gz"):
            run = line["runs"]
            algorithm = run["config"]["algorithm"]
            of = algorithm.get("test_l2", algorithm["l2"]), algorithm.get("test_crops")
            found[of, name] = f"{100 * run['result']['test_accuracy']:.1f}"
    rows = {"`l2=0.1` in test as in training, one crop": (0.1, None),
            "`test_l2=3`, one crop": (3, None), "`test_l2=3`, ten crops": (3, 10)}
    page = (DOCS / "reproduction.md").read_text()
    for words, of in rows.items():
        shown = " | ".join(found.get((of, name), "–") for name in ("cifarfs", "fc100"))
        assert f"| {words} | {shown} |" in page


def column_of(page: Path, name: str) -> dict[str, str]:
    """Of the page's table that has a column of this name: its cells by those of the first."""
    lines = page.read_text().splitlines()
    (top,) = (n for n, line in enumerate(lines) if line[:9] == "| method " and name in cells(line))
    below = [cells(line) for line in takewhile(lambda line: line[:1] == "|", lines[top + 2 :])]
    return {row[0]: row[cells(lines[top]).index(name)] for row in below}


def cells(line: str) -> list[str]:
    """Without the report's bold."""
    return [cell.strip().removeprefix("**").removesuffix("**") for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("drawn", FILES_OF["accuracy"], indirect=True)
def test_the_page_says_how_far_first_order_anil_is_behind(drawn: Drawn) -> None:
    lead = drawn.rows("summary")["fo_anil"]
    mean, half = (f"{100 * float(lead[f'lead_{what}']):.1f}" for what in ("mean", "half_width"))
    assert f"{mean} ± {half}" in (DOCS / "reproduction.md").read_text()


@pytest.mark.parametrize("drawn", FILES_OF["papers"], indirect=True)
@pytest.mark.parametrize("table", ["summary", "time"])
def test_the_page_shows_the_report_s_tables(drawn: Drawn, table: str) -> None:
    pages = (drawn.folder / f"{table}_{drawn.sweep}_{drawn.benchmark}.md",
             DOCS / "reproduction_tables.md")  # fmt: skip
    # every line of a table but the one under the head
    wanted, shown = ([cells(line) for line in page.read_text().splitlines()
                      if line.startswith("|") and line.strip("|-: ")] for page in pages)
    assert any(shown[n : n + len(wanted)] == wanted for n in range(len(shown))), wanted


# The papers' figures


class Papers(NamedTuple):
    """The recorded runs, and the report of them."""

    lines: Recorded
    folder: Path

    def recorded(self, name: str) -> dict[int, float]:
        (line,) = [line for line in self.lines if name in line["metrics"]]
        return points(line, name)

    def row(self, table: str, **wanted: str) -> dict[str, str]:
        (row,) = [r for r in rows(self.folder, table) if wanted.items() <= r.items()]
        return row

    def curve(self, name: str, table: str, key: str = "K_{}", **wanted: str) -> dict[int, float]:
        """A metric, which the table has too."""
        curve, row = self.recorded(name), self.row(table, **wanted)
        assert {at: float(row[key.format(at)]) for at in curve} == curve
        return curve


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("claims")
    return Papers(reported(DOCS / "records/papers_figures.jsonl.gz", ["smoke"], folder), folder)


def slope(curve: dict[int, float]) -> float:
    """Least squares through the logarithms."""
    return linear_regression(list(map(math.log, curve)), list(map(math.log, curve.values()))).slope


def test_theorem_2_the_average_falls_as_one_over_t(papers: Papers) -> None:
    curves = [papers.recorded(f"convergence/all_tasks/{n}/average") for n in range(3)]
    slopes = [slope({t: value for t, value in curve.items() if t >= 40}) for curve in curves]
    row = papers.row("convergence_slopes", what="Theorem 2: average against T")
    shown = markdown(papers.folder, "convergence_slopes")
    assert "| Theorem 2: average against T | -1 | -1.000 ± less than 0.001 |" in shown
    assert re.search(r"for each epsilon, K = 20 \| 1 \| \d\.\d+ \|", shown)
    assert float(row["slope"]) == approx(mean(slopes), abs=1e-5)
    assert mean(slopes) == approx(-1, abs=1e-3)


@pytest.mark.parametrize("k", ["5", "20", "60"])
def test_theorem_1_the_floor_falls_as_one_over_the_batch(papers: Papers, k: str) -> None:
    """The recorded floors are means over problems; their slope is within the mean's interval."""
    name, table = f"convergence/floor/{k}", "convergence_floors"
    floor = papers.curve(name, table, "B_{}", K=k)
    assert papers.curve(f"{name}/half_width", table, "B_{}_half_width", K=k)
    row = papers.row("convergence_slopes", what=f"Theorem 1: floor against |B|, K = {k}")
    assert abs(slope(floor) - float(row["slope"])) < float(row["half_width"])


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize(("what", "bound"), [("inner_steps", "K_0 = 20"), ("cg_steps", "N_0 = 10")])
def test_steps_around_the_bounds(papers: Papers, what: str, bound: str, start: str) -> None:
    table = f"convergence_{what}"
    assert papers.curve(f"convergence/{what}/{start}", table, "at_{}", start=start)
    assert f"{bound}." in markdown(papers.folder, table)


@pytest.mark.parametrize(("size", "cg", "ahead"), [(5, 5, 10), (20, 5, 6), (20, 10, 8)])
def test_imaml_errs_less_than_maml_at_equal_steps(
    size: int, cg: int, ahead: int, papers: Papers
) -> None:
    """At so many of the ten K, the smallest ones."""
    name = f"hypergradient/regression_{size}"
    ours, theirs = (papers.curve(f"{name}/{method}", name.replace("/", "_"), method=method)
                    for method in (f"imaml_cg{cg}", "maml"))  # fmt: skip
    assert [k for k in sorted(ours) if ours[k] < theirs[k]] == sorted(ours)[:ahead]


@pytest.mark.parametrize("name", ["maml/as_published", "anil/as_published", "itd_bio/as_published",
                                  "anil/cached", "itd_bio/cached"])  # fmt: skip
def test_more_than_half_of_the_memory_is_saved_as_published_and_nothing_against_caches(
    papers: Papers, name: str
) -> None:
    ours, theirs = (papers.recorded(f"memory/{each}")[5] for each in ("rm_metal/cached", name))
    method, variant = name.replace("_p", " p").split("/")
    row = papers.row("memory_yang_peak", method=method, variant=variant)
    saved = 1 - ours / theirs
    assert float(row["saved"]) == approx(saved, abs=1e-12)
    assert abs(saved) < 0.01 if variant == "cached" else saved > 0.5


@pytest.mark.parametrize(
    ("name", "table"), [("memory/rm_metal/cached", "memory_yang_peak"),
                        ("imaml_memory/imaml/gradient", "memory_rajeswaran_peak")]
)  # fmt: skip
def test_memory_is_flat_in_the_inner_steps(papers: Papers, name: str, table: str) -> None:
    _, method, variant = name.split("/")
    shown = {"rm_metal": "ImplicitCGHead", "imaml": "ImplicitMAML"}[method]
    peaks = papers.curve(name, table, method=shown, variant=variant)
    assert max(peaks) >= 32 * min(peaks) and max(peaks.values()) < 1.01 * min(peaks.values())


def test_imamls_compute_is_fomamls_plus_a_constant(papers: Papers) -> None:
    ours, first_order, maml = (
        papers.curve(f"imaml_seconds/{method}/{variant.replace(' ', '_')}",
                     "memory_rajeswaran_seconds", variant=variant,
                     method="ImplicitMAML" if method == "imaml" else method)
        for method, variant in (("imaml", "gradient"), ("fomaml", "as published"),
                                ("maml", "as published"))
    )  # fmt: skip
    more = [ours[k] - first_order[k] for k in ours]
    assert max(more) < 1.25 * min(more)
    assert maml[32] / maml[1] > 5 * ours[32] / ours[1]
    assert [k for k in sorted(ours) if ours[k] < maml[k]] == [8, 16, 32]
