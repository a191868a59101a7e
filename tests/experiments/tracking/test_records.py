"""Runs exported to a file and imported elsewhere: real servers, the same report, no doubles."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from gridfs import GridFS
from pymongo.collection import Collection
from report_runs import CURVE, WORDS, Recorder, fill, finals, grid

from experiments.report.__main__ import main as report_main
from experiments.sweep import main as sweep_main
from experiments.sweeps.cells import Cell
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import Plan, make_plan
from experiments.tracking.database import Database, choose
from experiments.tracking.export import collect
from experiments.tracking.export import main as export
from experiments.tracking.import_runs import import_records
from experiments.tracking.import_runs import main as import_
from experiments.tracking.records import Records, read_records, write_records

pytest_plugins = ("report_fixtures",)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("second")


@pytest.fixture
def elsewhere(second: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """Another database, emptied; from here on the command lines mean it."""
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(second))
    database = Database(choose())
    for name in database.documents.list_collection_names():
        database.documents[name].delete_many({})
    yield database
    database.close()


@pytest.fixture
def export_to(tmp_path: Path, recorder: Recorder) -> Callable[..., Path]:
    """Exports with these words; the file."""

    def write(*words: str) -> Path:
        path = tmp_path / "records.jsonl.gz"
        assert export([str(path), *words]) == 0
        return path

    return write


@pytest.fixture
def exported(tmp_path: Path, recorder: Recorder) -> Callable[..., Records]:
    """What a file of all runs holds."""

    def write(artifacts: bool = False) -> Records:
        path = tmp_path / "all.jsonl.gz"
        write_records(path, collect(recorder.documents, {}, artifacts))
        return read_records(path)

    return write


def dump(documents: Any) -> dict[str, list[Any]]:
    names = sorted(documents.list_collection_names())
    return {name: sorted(documents[name].find(), key=lambda d: str(d["_id"])) for name in names}


def claim(documents: Any, cell: Cell, state: str = "free") -> None:
    documents["sweep_cells"].insert_one({"_id": cell.identity, "state": state, "failures": []})


def file_of(folder: Path) -> dict[str, bytes]:
    """What the report wrote but the page, which has the time of day."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".html"}


def test_a_fresh_database_has_the_same_report(
    recorder: Recorder, plan: Plan, export_to: Callable[..., Path], second: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fill(recorder, plan, random.Random(0), share=0.8)
    recorder.run({"tasks.name": "glyphs", "seed": 0}, status="FAILED", fail_trace=["x", "E: no"])
    curves = {"hypergradient/logistic/itd_bio": {1: 1.0, 5: 0.5},
              "hypergradient/logistic/rm_metal_cg2": {1: 2.0, 5: 0.1}}  # fmt: skip
    recorder.run({"problems": 3}, curves, experiment="hypergradient")
    assert report_main([*WORDS, "--output", str(tmp_path / "here")]) == 0
    path = export_to()
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(second))
    assert import_([str(path)]) == 0
    assert report_main([*WORDS, "--output", str(tmp_path / "there")]) == 0
    here, there = file_of(tmp_path / "here"), file_of(tmp_path / "there")
    assert "accuracy_accuracy_glyphs.csv" in here and "hypergradient.png" in here
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_importing_twice_or_where_it_was_recorded_changes_nothing(
    recorder: Recorder, plan: Plan, exported: Callable[..., Records], elsewhere: Database
) -> None:
    fill(recorder, plan, random.Random(0), share=0.5)
    claim(recorder.documents, finals(plan, "anil")[0])
    at_home = dump(recorder.documents)
    records = exported()
    first = import_records(records, elsewhere.documents, "f")
    once = dump(elsewhere.documents)
    assert first.new == len(at_home["runs"]) and len(once["runs"]) == first.new
    assert import_records(records, elsewhere.documents, "f") == (0, first.new)
    assert dump(elsewhere.documents) == once
    assert import_records(records, recorder.documents, "f") == (0, first.new)
    assert dump(recorder.documents) == at_home


def test_merging_maps_every_reference(
    recorder: Recorder, exported: Callable[..., Records], elsewhere: Database
) -> None:
    """The numbers 1 to 3 and one file's number are taken by something else there."""
    image = GridFS(recorder.documents).put(b"png", filename="artifact://runs/1/curve.png")
    recorder.run({"seed": 0}, {"m": {1: 0.5}}, status="INTERRUPTED", info={"resumed_by": 2},
                 artifacts=[{"name": "curve.png", "file_id": image}])  # fmt: skip
    recorder.run({"seed": 0}, {"m": {1: 0.5, 2: 0.6}}, info={"resumes": "1"})
    recorder.run({"seed": 1}, {"m": {1: 0.7}}, info={"resumes": "9"})
    metric = recorder.documents["metrics"].find_one({"run_id": 1})
    there = elsewhere.documents
    there["runs"].insert_many([{"_id": n, "status": "RUNNING"} for n in (1, 2, 3)])
    there["metrics"].insert_one({"_id": metric["_id"], "run_id": 1, "name": "m", "steps": []})
    GridFS(there).put(b"other", _id=image, filename="x")
    import_records(exported(artifacts=True), there, "f")
    first, second, third = there["runs"].find({"_id": {"$gt": 3}}).sort("_id", 1)
    assert first["info"]["resumed_by"] == second["_id"] == 5
    assert second["info"]["resumes"] == "4"
    assert third["info"]["resumes"] == "9, which was not exported"
    assert first["info"]["imported_from"] == {"file": "f", "run": 1}
    moved = there["metrics"].find_one({"run_id": 4})
    assert moved["values"] == [0.5] and str(moved["_id"]) == first["info"]["metrics"][0]["id"]
    file = GridFS(there).get(first["artifacts"][0]["file_id"])
    assert (file.read(), file.filename) == (b"png", "artifact://runs/4/curve.png")
    assert GridFS(there).get(image).read() == b"other"
    assert [r["status"] for r in there["runs"].find({"_id": {"$lte": 3}})] == ["RUNNING"] * 3
    (_, source), = second["experiment"]["sources"]
    assert GridFS(there).get(source).read() == b"1"


def test_a_sweep_takes_imported_cells_as_completed(
    recorder: Recorder, plan: Plan, exported: Callable[..., Records], elsewhere: Database,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    grid(recorder, plan, "anil", (0.5, 0.6, 0.55))
    elsewhere.documents["runs"].insert_one({"_id": 2, "status": "FAILED"})
    import_records(exported(), elsewhere.documents, "f")
    assert sweep_main([*WORDS, "--list"]) == 0
    output = capsys.readouterr().out
    assert "12 cells: 3 completed (3 by other code), 9 pending" in output
    assert "of validation accuracies 50.0 60.0 55.0" in output


def test_an_interrupted_import_goes_on(
    recorder: Recorder, exported: Callable[..., Records], elsewhere: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped before each of its writes in turn."""
    for seed in range(2):
        recorder.run({"seed": seed}, {"m": {1: 0.5}, "n": {1: 0.5}})
    records, there = exported(), elsewhere.documents
    import_records(records, there, "f")
    whole, stopped = _without_times(dump(there)), 0
    while True:
        for name in whole:
            there[name].delete_many({})
        with monkeypatch.context() as patch:
            _break(patch, stopped)
            try:
                import_records(records, there, "f")
                break
            except InterruptedError:
                stopped += 1
        assert there["runs"].count_documents({"status": "COMPLETED"}) < 2
        import_records(records, there, "f")
        assert _without_times(dump(there)) == whole, stopped
    assert stopped >= 8


def _without_times(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leaves out when a file was stored, and the numbers of its pieces."""
    return {name: [{k: v for k, v in d.items() if k != "uploadDate"} for d in documents]
            for name, documents in found.items() if name != "fs.chunks"}  # fmt: skip


def _break(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The database fails at the write after so many."""
    left = [after]

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return write(*arguments, **options)

        return call

    for name in ("insert_one", "insert_many", "replace_one", "delete_many", "update_one"):
        monkeypatch.setattr(Collection, name, failing(getattr(Collection, name)))


def test_what_is_left_out_is_named_and_places_are_hidden(
    recorder: Recorder, export_to: Callable[..., Path]
) -> None:
    number = recorder.run(
        {"tasks.root": "/data/me/images", "seed": 0},
        {"train/seconds": {1: 1.0}, "validation/accuracy": {1: 0.5}},
        captured_out="x" * 5000 + "read /data/me/images/a.png", omniboard={"notes": "mine"},
        artifacts=[{"name": "parameters.pt", "file_id": ObjectId()}], experiment="train",
    )  # fmt: skip
    recorder.run({"seed": 1}, status="RUNNING")
    recorder.documents["runs"].update_one(
        {"_id": number}, {"$set": {"experiment.repositories": [{"url": "/data/me/x"}]}}
    )
    path = export_to()
    (run,) = read_records(path)["runs"]
    assert run["info"]["left_out"] == {"metrics": ["train/seconds"],
                                       "artifacts": ["parameters.pt"],
                                       "characters_of_output": 3026}  # fmt: skip
    assert run["captured_out"].endswith("read DATA/a.png") and "omniboard" not in run
    assert run["config"]["tasks"]["root"] == "DATA"
    assert run["experiment"]["repositories"] == [{"url": ""}]
    assert b"/me" not in gzip.decompress(path.read_bytes())
    assert [m["name"] for m in read_records(path)["metrics"]] == ["validation/accuracy"]


def test_runs_are_chosen_by_number_field_and_sweep(
    recorder: Recorder, plan: Plan, export_to: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    grid(recorder, plan, "anil", (0.5, 0.6, 0.55))
    recorder.training(finals(plan, "anil", 2)[1], CURVE)
    recorder.run({"seed": 0}, experiment="memory")
    ids = [[run["_id"] for run in read_records(export_to(*words))["runs"]]
           for words in (["2-3", "5"], ["experiment.name=memory"], ["--sweep", *WORDS])]
    assert ids == [[2, 3, 5], [5], [1, 2, 3, 4]]
    assert export([str(tmp_path / "none"), "77"]) == 1
    assert capsys.readouterr().err == "error: no run that has ended fits; nothing is written\n"
    assert not (tmp_path / "none").exists()


def test_a_sweep_without_grids(recorder: Recorder, export_to: Callable[..., Path]) -> None:
    for cell in make_plan(SWEEPS["smoke"], {}).groups[0].finals[0].values():
        recorder.run({**cell.settings, "cell": cell.identity}, result={"test_accuracy": 0.5})
    assert len(read_records(export_to("--sweep", "smoke"))["runs"]) == 2
