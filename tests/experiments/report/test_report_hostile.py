"""Whatever a database holds, the report is made: a bad document costs its own line."""

import copy
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import bson
import pytest
from bson import Binary, Decimal128, ObjectId, Regex
from bson.datetime_ms import DatetimeMS
from report_runs import CURVE, Recorder, Report, rows, validations

from experiments.report.__main__ import main
from experiments.sweeps.definition import Cell
from experiments.sweeps.listing import Board, runs_of, summary, table
from experiments.sweeps.plan import Plan
from experiments.sweeps.runs import Run
from experiments.tracking.records import LENIENT, plain

pytest_plugins = ("report_runs",)

CONFIG = {"tasks.name": "glyphs", "tasks.root": "/x", "algorithm.name": "anil", "seed": 0,
          "budget": 240, "test_at": [1500], "budget_clock": "cpu", "cell": "c0"}  # fmt: skip
RESULT = {"test_accuracy": 0.5, "test_half_width": 0.01, "iterations": 300, "step_seconds": 0.1,
          "step_peak_bytes": 2.0**25, "diverged": None}  # fmt: skip
DEEP: Any = 1
for _ in range(80):
    DEEP = [DEEP]
WRONG: list[Any] = [
    "x", "", "{[]: 1}", "(" * 500, "\x1b[31mred\x00\u202e", "$\\frac{$", 7, -1e308, math.nan, True,
    2**62, [], ["a", 1], [["a"]], [["x" * 5000, "y"]], [None, {}], {}, {"a": {"b": 1}}, DEEP,
    datetime(2026, 1, 1), ObjectId("0" * 24), Decimal128("1.5"), Regex("a"), b"\xff",
    Binary(b"a" * 16, 4),
]  # fmt: skip


def changed(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, dict]]:
    """For every field, dotted, and wrong value: both, and a copy of the document that has it."""
    for key, value in document.items():
        for wrong in WRONG if key != "_id" else ():
            yield prefix + key, repr(wrong), {**document, key: wrong}
        if isinstance(value, dict):
            for path, wrong, inner in changed(value, f"{prefix}{key}."):
                yield path, wrong, {**document, key: inner}


def listed(folder: Path) -> dict[str, str]:
    """What the lists of runs say, by run."""
    files = folder.glob("runs*.csv")
    return {r["run"]: r["remarks"] for file in files for r in rows(folder, file.stem)}


def training(recorder: Recorder) -> dict[str, Any]:
    """A good run's document; its number is 1."""
    recorder.run(
        CONFIG, validations(CURVE), result=RESULT, info={"resumes": "3", "resumed_by": 4},
        meta={"named_configs": ["glyphs"], "config_updates": {"seed": 1}}, fail_trace=["x"],
    )  # fmt: skip
    return recorder.documents["runs"].find_one({"_id": 1})


def test_a_field_of_any_type_costs_its_run_a_line(recorder: Recorder, report: Report) -> None:
    """Every field with every wrong value, each in a run of its own, all in one database."""
    good = training(recorder)
    recorder.run({**CONFIG, "tasks.name": "other"}, validations(CURVE), result=RESULT)
    (alone,) = rows(report("smoke"), "other_other")
    bad = {(path, wrong): {**copy.deepcopy(run), "_id": 100 + n}
           for n, (path, wrong, run) in enumerate(changed(good))}  # fmt: skip
    assert len(bad) > 700
    recorder.documents["runs"].insert_many(bad.values())
    folder = report("smoke")
    told = listed(folder)
    assert {str(run["_id"]) for run in bad.values()} <= set(told)
    for path, kind in (("meta.config_updates", "an object"), ("config", "an object"),
                       ("experiment.sources", "a list"), ("result.test_accuracy", "a number"),
                       ("start_time", "a time")):  # fmt: skip
        remark = told[str(bad[path, "'x'"]["_id"])]
        assert f"not readable: {path}: expected {kind}" in remark, remark
    assert rows(folder, "other_other") == [alone]
    found = runs_of(recorder, ["c0"])["c0"]  # and so does the list of a sweep
    board, cell = Board(Plan(()), recorder, redo_changed=False), Cell("x", (), {})
    statuses = [board._status(f"anil/final/{run.id}", cell, [run], None) for run in found]
    lines = [*table(statuses), summary(statuses, 1)]
    assert len(lines) > 600 and all(line.isprintable() for line in lines)


def test_a_metric_or_a_source_file_of_any_shape_costs_its_run_a_line(
    recorder: Recorder, report: Report
) -> None:
    training(recorder)
    metrics, files = (recorder.documents[name] for name in ("metrics", "fs.files"))
    number = 1
    shapes = [*WRONG, [1, "a", 300], [True, 2, 3], [math.nan, 1.0], [1.5, 2], [2**62] * 3]
    for field in ("steps", "values", "name", "run_id"):
        for value in shapes:
            number = recorder.run(CONFIG, validations(CURVE), result=RESULT)
            broken = {"run_id": number, "name": "validation/accuracy"}
            metrics.update_one(broken, {"$set": {field: value}})
    for field in ("md5", "filename"):
        for value in WRONG:
            number = recorder.run(CONFIG, result=RESULT, sources={f"{number}.py": "1"})
            files.update_one({"filename": f"{number - 1}.py"}, {"$set": {field: value}})
    metrics.insert_one({"_id": ObjectId()})
    files.insert_one({"_id": {"a": 1}, "md5": "x"})
    told = listed(report("smoke"))
    assert len(told) == number
    assert "validation/accuracy: steps or values are no list" in told["2"]
    remark = told[str(2 + len(WRONG))]
    assert "validation/accuracy: 1 of 3 points are no numbers at steps" in remark, remark


def test_a_time_or_a_text_that_python_cannot_hold() -> None:
    """A year beyond 9999, and bytes that are no UTF-8: a MongoDB holds what a program wrote there.

    The embedded server refuses them, so they are decoded here as the answers of a server are.
    """
    content = bson.encode({"_id": 1, "start_time": DatetimeMS(2**60), "config": {"a": "AAAA"}})
    document = bson.decode(content.replace(b"AAAA", b"\xff\xfeAA"), codec_options=LENIENT)
    run = Run(plain(document))
    assert run.started is None and run.settings["a"].endswith("AA")
    assert run.faults == ["start_time: expected a time, got text"]


def test_names_are_told_apart_and_become_files_of_their_own_in_the_folder(
    recorder: Recorder, report: Report, tmp_path: Path
) -> None:
    """Those of runs, benchmarks, methods and experiments; none of them becomes a path."""
    outside = tmp_path / "outside"
    outside.mkdir()
    paths = ["../up", "../../up", f"{outside}/x"]
    good = training(recorder)
    ids = ["1", *paths, 1.5, True, {"a": 1}, ObjectId(), b"\xff", None, "\x1b"]
    recorder.documents["runs"].insert_many([{**good, "_id": number} for number in ids])
    names = [*paths, "a b", "a_b", "A_B", "x" * 3000, "\x00\x1b]0;t\x07", "", "con"]
    for name in names:
        config = {**CONFIG, "tasks.name": name, "algorithm.name": "$\\frac{$" + name}
        recorder.run(config, validations(CURVE), result=RESULT)
        recorder.run({}, experiment=name)
    folder = report("smoke")
    assert all(path.parent == folder for path in folder.rglob("*")) and not list(outside.iterdir())
    assert not [path for above in (tmp_path, tmp_path.parent) for path in above.glob("up*")]
    runs = [r["run"] for r in rows(folder, "runs_train")]
    assert len(set(runs)) == len(runs) - 1 == len(ids) + len(names), '1 and "1" look alike'
    own = [rows(folder, file.stem)[0]["source_runs"] for file in folder.glob("other*.csv")]
    assert len(set(own)) == len(own) == len(names) + 1


def test_nothing_is_printed_raw(
    recorder: Recorder, report: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in a file nor on the terminal, where a control character is a command."""
    bad = "\x1b]0;title\x07\u202e\x9b31m<script>"
    recorder.run({"tasks.name": bad, bad: bad, "seed": 0}, {bad: {1: 0.5}, **validations(CURVE)},
                 result={"test_accuracy": 0.5, bad: 1.5, "diverged": bad}, experiment="train",
                 host={"hostname": bad}, info={"resumes": bad}, sources={bad: "1"},
                 meta={"named_configs": [bad], "config_updates": {bad: bad}})  # fmt: skip
    recorder.run({}, status=bad, experiment=bad, fail_trace=[bad], commit=bad)
    recorder.run({}, status="FAILED", fail_trace=[bad])
    folder = report()
    assert main([bad]) == 1
    shown = "".join(capfd.readouterr())
    for text in (shown, *(p.read_text("utf-8") for p in folder.iterdir() if p.suffix != ".png")):
        assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "\\x1b" in shown and "<script>" not in (folder / "index.html").read_text("utf-8")


PAPERS = {
    "memory": [f"memory/{n}" for n in ("a/b", "rm_metal/cached", "$x/c", "_y/d", "supervised")],
    "hypergradient": ["hypergradient/a/b", "hypergradient/$/_", "hypergradient//"],
    "convergence": ["convergence/all_tasks/0/average", "convergence/all_tasks/x/average",
                    "convergence/floor/5", "convergence/floor/5/half_width",
                    "convergence/floor/99999999999999999999", "convergence/cg_steps/warm"],
}  # fmt: skip


def test_a_paper_s_run_of_any_shape(recorder: Recorder, report: Report) -> None:
    """Its picture is drawn or said to be missing; the training beside it is shown."""
    training(recorder)
    curves = [{0: 0.0, 5: -1.0}, {1: 1e308, 2: -1e308}, {-3: 1.0}, {5: 0.0}]
    for experiment, names in PAPERS.items():
        for number, curve in enumerate(curves):
            recorder.run({"number": number, "problems": [1]}, dict.fromkeys(names, curve),
                         experiment=experiment, result={"K_0": "x", "slope_a": [1]})  # fmt: skip
    folder = report("smoke")
    page = (folder / "index.html").read_text(encoding="utf-8")
    drawn = [picture for name in PAPERS for picture in folder.glob(f"{name}*.svg")]
    assert len(drawn) + page.count("Not drawn (") == len(PAPERS) * len(curves)
    assert all(len(rows(folder, f"runs_{name}")) == len(curves) for name in PAPERS)
    assert len(rows(folder, "other_glyphs")) == 1
