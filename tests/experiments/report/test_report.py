"""What the report averages, what it never does, and what it shows as missing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from report_runs import CURVE, WORDS, Recorder, Report, finals, grid, markdown, row, rows

from experiments.sweeps.definition import Cell
from experiments.sweeps.plan import Plan

pytest_plugins = ("report_runs",)
SUMMARY, MISSING, TIME = (f"{what}_accuracy_glyphs" for what in ("summary", "missing", "time"))


def test_methods_are_compared_seed_by_seed(recorder: Recorder, plan: Plan, report: Report) -> None:
    """Seed 1 of anil is missing: the differences are those of seeds 0 and 2 (t = 12.706)."""
    scores = {"ImplicitCGHead": ((0.65, 0.70), (0.70, 0.73), (0.71, 0.76)),
              "anil": ((0.62, 0.69), None, (0.66, 0.71))}  # fmt: skip
    names = ("test_accuracy", "early_stopped_accuracy")
    for method, pairs in scores.items():
        grid(recorder, plan, method)
        for cell, pair in zip(finals(plan, method), pairs, strict=True):
            if pair:
                recorder.training(cell, CURVE, result=dict(zip(names, pair, strict=True)))
    folder = report(*WORDS)
    found = row(folder, SUMMARY, "anil")
    assert (found["seeds"], found["runs"], found["lead_seeds"]) == ("2", "10, 11", "2")
    assert row(folder, SUMMARY, "ImplicitCGHead")["lead_seeds"] == "0"
    assert found["source_command"].startswith("python -m experiments.sweep accuracy")
    summary = markdown(folder, SUMMARY)
    assert "| early stopped, % | then behind by |" in summary
    assert "| anil | algorithm.lr=0.1 | 2/3 | 64.0 ± 1.0 | 25.4 | 4.0 ± 12.7 | 70.0 |" in summary
    assert "| 3.0 ± 25.4 |" in summary and "| 300 | 0.100 | 32.0 | 0 of 2 |" in summary
    assert "Early stopped: test accuracy of theta" in summary
    of_grid = "50.0, 60.0, 55.0"
    assert f"In the grid's order: ImplicitCGHead {of_grid}; anil {of_grid}." in summary
    said = "anil, runs 10, 11: only 1 of 2 seeds have a finite early stopped score"
    assert said not in summary
    gone = {"$set": {"result.early_stopped_accuracy": math.nan}}
    recorder.documents["runs"].update_one({"_id": 10}, gone)
    assert said in markdown(report(*WORDS), SUMMARY)


def test_missing_cells_have_their_command(recorder: Recorder, plan: Plan, report: Report) -> None:
    grid(recorder, plan, "anil")
    failed, stopped, running = finals(plan, "anil")
    recorder.training(failed, CURVE, status="FAILED", fail_trace=["x", "ValueError: no"])
    recorder.training(stopped, CURVE, status="INTERRUPTED", info={"resumed_by": 6})
    recorder.training(running, CURVE, status="RUNNING", info={"resumes": "5"})
    folder = report(*WORDS)
    found = {r["cell"]: (r["state"], r["attempts"]) for r in rows(folder, MISSING)}
    assert found == {
        **{f"ImplicitCGHead/{cell}/{n}": ("pending", "")
           for cell in ("grid", "final") for n in range(3)},
        "anil/final/0": ("failed", "4"), "anil/final/1": ("interrupted", "5"),
        "anil/final/2": ("running", "6"),
    }  # fmt: skip
    words = "python -m experiments.sweep accuracy benchmark=glyphs methods=ImplicitCGHead,anil"
    assert f"{words} --cell anil/final/0" in [r["command"] for r in rows(folder, MISSING)]
    summary = markdown(folder, SUMMARY)
    assert "missing" in summary and "early stopped" not in summary
    listed = {r["run"]: r["remarks"] for r in rows(folder, "runs_train")}
    assert "went on as run 6" in listed["5"] and "goes on from run 5" in listed["6"]
    assert "ValueError: no" in listed["4"]
    recorder.documents["runs"].update_one({"_id": 4}, {"$set": {"fail_trace": ["killed: kill -9"]}})
    found = {r["cell"]: r["state"] for r in rows(report(*WORDS), MISSING)}
    assert found["anil/final/0"] == "interrupted", "a death from outside is no failure"


@pytest.mark.parametrize("given", [{}, {"tasks": {"root": "/somewhere"}}])
def test_commands_name_a_data_folder_only_where_one_was_given(
    recorder: Recorder, plan: Plan, report: Report, given: dict[str, Any]
) -> None:
    cell = finals(plan, "ImplicitCGHead", 0)[0]
    cell = replace(cell, settings={**cell.settings, "tasks.root": "~/data"})  # the default
    recorder.training(cell, CURVE, meta={"config_updates": given})
    command = row(report(*WORDS), SUMMARY, "ImplicitCGHead")["source_command"]
    assert ("tasks.root=DATA" in command) == bool(given)


def test_other_code_and_settings_are_never_averaged_silently(
    recorder: Recorder, plan: Plan, report: Report
) -> None:
    """One line says what differs; another commit of the same files is the same code."""
    grid(recorder, plan, "anil")
    first, second, third = finals(plan, "anil")
    recorder.training(first, CURVE)
    recorder.training(second, CURVE, commit="b" * 40, dirty=True)
    assert row(report(*WORDS), SUMMARY, "anil")["differs"] == "False"
    settings = {**third.settings, "algorithm.l2": 0.1}  # a default that changed
    run = recorder.training(Cell(third.module, third.configs, settings), CURVE,
                            sources={"experiments/train.py": "2", "a.py": "1"})  # fmt: skip
    change = {"$set": {"config.cell": third.identity}}
    recorder.documents["runs"].update_one({"_id": run}, change)
    folder = report(*WORDS)
    assert row(folder, SUMMARY, "anil")["differs"] == "True"
    for file in (f"{SUMMARY}.md", "index.html"):
        text = (folder / file).read_text()
        assert "anil: code differs" in text and "in a.py, experiments/train.py" in text, file
        assert "anil: settings differ between its runs: algorithm.l2 = not set or 0.1" in text


def test_outside_sweeps_only_equal_runs_share_a_row(recorder: Recorder, report: Report) -> None:
    base = {"tasks.name": "glyphs", "algorithm.name": "maml", "meta_lr": 0.1}
    result = {"test_accuracy": 0.5, "test_half_width": 0.01}
    for seed in range(3):
        recorder.run({**base, "seed": seed}, result=result)
    recorder.run({**base, "seed": 0}, result={**result, "test_accuracy": 0.8})
    recorder.run({**base, "seed": 3, "meta_lr": 0.2}, result=result)
    recorder.run({**base, "seed": 4}, result=result, sources={"experiments/train.py": "2"})
    recorder.run({**base, "seed": 5}, result=result, info={"tasks": {"samples": {"train": 9}}})
    for seed, score in enumerate((0.5, math.nan)):
        recorder.run({**base, "seed": seed, "ways": 2}, result={**result, "test_accuracy": score})
    folder = report()
    found = {r["runs"]: r for r in rows(folder, "other_glyphs")}
    assert set(found) == {"2-4", "5", "6", "7", "8, 9"}, "of seed 0 the newest; the others apart"
    said = "maml, runs 8, 9: only 1 of 2 seeds have a finite test score"
    assert said in markdown(folder, "other_glyphs")
    assert "data.samples.train=9" in found["7"]["setting"]
    assert float(found["2-4"]["test_mean"]) == pytest.approx(0.6)
    assert found["5"]["setting"] == "meta_lr=0.2"


def test_collapse_divergence_and_the_budget(recorder: Recorder, plan: Plan, report: Report) -> None:
    """Budget 240 s, 0.1 s an iteration: what comes after iteration 2400 is after the budget."""
    grid(recorder, plan, "anil")
    first, second, third = finals(plan, "anil")
    kept = {"test/accuracy": {1500: 0.62, 2400: 0.6},
            "test/training_seconds": {1500: 150.0, 2400: 240.0}}
    recorder.training(first, {1000: 0.7, 2000: 0.5, 2400: 0.7})
    recorder.training(second, {1000: 0.7, 2400: 0.65, 3000: 0.2}, metrics=kept)
    recorder.training(third, {1000: 0.7, 2000: 0.61}, result={"diverged": "at 2001: nan"})
    found = row(report(*WORDS), SUMMARY, "anil")
    assert (found["collapsed"], found["diverged"]) == ("1", "1")
    assert float(found["validation_mean"]) == pytest.approx(0.7)
    assert float(found["iterations_mean"]) == pytest.approx((2400 + 2400 + 2000) / 3)
    assert float(found["equal_mean"]) == pytest.approx(0.62) and found["equal_seeds"] == "1"


def test_seconds_to_the_share_of_the_best_of_all(
    recorder: Recorder, plan: Plan, report: Report
) -> None:
    """The best is 0.8, of ImplicitCGHead; the threshold 0.72. Who gets there at the same validation
    is as fast."""
    curves = {"ImplicitCGHead": {202: 0.8, 300: 0.8}, "anil": {200: 0.73, 300: 0.7}}
    for method, curve in curves.items():
        grid(recorder, plan, method)
        for cell in finals(plan, method):
            recorder.training(cell, curve)

    def changed(old: list[float], new: list[float]) -> dict[str, tuple[str, str]]:
        question, change = {"values": old}, {"$set": {"values": new}}
        recorder.documents["metrics"].update_many(question, change)
        return {r["method"]: (r["reached"], r["seconds"]) for r in rows(report(*WORDS), TIME)}

    folder = report(*WORDS)
    assert float(row(folder, TIME, "anil")["threshold"]) == pytest.approx(0.72)
    text = markdown(folder, TIME)
    assert "**≤ 20.2 ± 0.0**" in text and "**≤ 20.0 ± 0.0**" in text
    ours = {"ImplicitCGHead": ("3", "20.2")}
    assert changed([0.73, 0.7], [0.7, 0.73]) == {**ours, "anil": ("3", "30.0")}
    assert changed([0.7, 0.73], [0.6, 0.7])["anil"] == ("0", "nan")
    seconds = {"name": "validation/training_seconds"}
    recorder.documents["metrics"].update_many(seconds, {"$set": {"values": [0.0, 0.0]}})
    assert row(report(*WORDS), TIME, "ImplicitCGHead")["ratio"] == "nan"


@pytest.mark.parametrize("cell", [None, "in a sweep"])
def test_a_regression_is_listed_too(
    recorder: Recorder, plan: Plan, report: Report, cell: str | None
) -> None:
    """A score of which less is better, and which is no accuracy, also in a sweep."""
    cell = cell and finals(plan, "anil")[0].identity
    recorder.run(
        {"tasks.name": "sine", "algorithm.name": "maml", "seed": 0, "cell": cell},
        result={"test_mse": 0.25, "test_half_width": 0.01},
        metrics={"validation/mse": {2: 0.9, 4: 0.3, 6: 0.4}},
    )
    folder = report(*WORDS)
    assert not (folder / f"{SUMMARY}.csv").exists()
    (found,) = rows(folder, "other_sine")
    assert (found["validation_mean"], found["collapsed"]) == ("0.3", "0")
    assert "0.250 mse" in markdown(folder, "other_sine")


# The papers' figures that one run holds: nothing is averaged.

MIB = 2.0**20
MEMORY = {"inner_steps": [1, 5, 20], "ways": 5, "shots": 5, "queries": 5, "pixels": 32,
          "hidden": 64, "limit_gib": 4.0, "device": "cpu", "seed": 0}  # fmt: skip
PEAKS = {
    "maml/as_published": {1: 100.0, 5: 250.0},
    "rm_metal/cached": {1: 50.0, 5: 50.0, 20: 50.0},
    "anil/cached": {1: 50.0, 5: 40.0, 20: 45.0},
    "supervised": {0: 49.0},
}


def memory(recorder: Recorder, scale: float = 1, updates: Mapping[str, Any] | None = None,
           **options: Any) -> None:  # fmt: skip
    metrics = {f"seconds/{name}": dict.fromkeys(by, 0.125) for name, by in PEAKS.items()}
    for name, by in PEAKS.items():
        metrics[f"memory/{name}"] = {k: v * scale * MIB for k, v in by.items()}
    recorder.run({**MEMORY, **(updates or {})}, metrics, experiment="memory",
                 meta={"config_updates": updates}, **options)  # fmt: skip


def test_runs_are_never_averaged_and_gaps_are_named(recorder: Recorder, report: Report) -> None:
    """The newest of equal settings counts; of other settings each is drawn by itself."""
    memory(recorder, 0.5, sources={"a.py": "1"})
    memory(recorder, sources={"a.py": "2"})
    memory(recorder, 0.5, {"hidden": 16})
    memory(recorder, updates={"seed": 1}, status="FAILED")
    folder = report("smoke")
    for end, mib, runs in (("", 50, "2"), ("_1", 25, "3")):
        table = rows(folder, f"memory_yang_peak{end}")
        (found,) = [r for r in table if r["method"] == "ImplicitCGHead"]
        assert (float(found["K_5"]), found["source_runs"]) == (mib * MIB, runs)
    text = markdown(folder, "memory_yang_peak")
    assert "| maml | as published | 100.0 | 250.0 | – | 80 |" in text
    assert "Missing: maml/as_published at K = 20" in text and "limit_gib=4.0" in text
    assert "Run 2 is the newest of 2 runs of equal settings" in text and "code differs" in text
    assert "in a.py" in text
    other = markdown(folder, "memory_yang_peak_1")
    assert "Other settings than above: python -m experiments.papers.memory with hidden=16" in other
    for number in range(4):
        memory(recorder, updates={"hidden": 32 + number})
    page = (report("smoke") / "index.html").read_text()
    assert "Not drawn: runs 3, 5, of still other settings." in page


def test_a_table_has_a_hundred_steps_and_says_so(recorder: Recorder, report: Report) -> None:
    """The figure's numbers are whole."""
    curve = dict.fromkeys(range(1, 301), MIB)
    recorder.run(MEMORY, {"memory/a/b": curve}, experiment="memory")
    folder = report("smoke")
    text = markdown(folder, "memory_yang_peak")
    assert "The first 100 of 300 are shown." in text
    assert "| K = 100 |" in text and "| K = 101 |" not in text
    assert len(rows(folder, "memory_yang")) == 300
