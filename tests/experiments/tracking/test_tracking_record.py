"""The journal, its upload, and what may be recorded."""

from __future__ import annotations

import math
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pymongo
import pytest
import torch
from bson import ObjectId
from fake_mongod import FakeMongod
from sacred.observers import RunObserver
from toy_process import (
    NOW,
    Server,
    environment,
    finish,
    points,
    run,
    start,
    wait_for,
    write_journal,
)

from experiments.tracking import TrackedExperiment, TrackingError, open_database, uploader
from experiments.tracking.journal import Journal, JournalReader
from experiments.tracking.uploader import Uploader, upload_journal
from experiments.tracking.values import (
    CUT,
    HEAD,
    TAIL,
    Tape,
    as_number,
    as_step,
    check_name,
    keep_output,
    storable,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder, also this process's own."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2L_IMPLICIT_DATA", str(folder))
        patch.setenv("HOME", str(folder))
        patch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
        yield folder


@pytest.fixture(scope="module")
def database(data: Path) -> Iterator[Any]:
    """The embedded server's database."""
    with open_database() as documents:
        yield documents


def test_an_upload_may_be_repeated(tmp_path: Path, database: Any) -> None:
    path, losses = write_journal(tmp_path / "r", 1000, [1.0, math.inf, 0.5]), [1.0, math.inf, 0.5]
    for _ in range(2):
        again = Uploader(JournalReader(path), database)
        again.upload()
        again.upload()
    stored = database["runs"].find_one({"_id": 1000})
    assert (stored["status"], stored["captured_out"]) == ("COMPLETED", "abd")
    assert [item["name"] for item in stored["artifacts"]] == ["a.bin"]
    assert points(database, 1000) == {"loss": losses}
    assert database["fs.files"].count_documents({"filename": "artifact://runs/1000/a.bin"}) == 1
    (metric,) = stored["info"]["metrics"]
    assert database["metrics"].find_one({"_id": ObjectId(metric["id"])})["name"] == "loss"


def change_status(database: Any) -> None:
    database["runs"].update_one({"_id": 1400}, {"$set": {"status": "FAILED"}})


def lose_the_run(database: Any) -> None:
    database["runs"].delete_one({"_id": 1400})


def lose_points(database: Any, left: int = 1) -> None:
    lost = {key: {"$each": [], "$slice": left} for key in ("steps", "values", "timestamps")}
    database["metrics"].update_one({"run_id": 1400}, {"$push": lost})


def lose_all_points(database: Any) -> None:
    lose_points(database, 0)


def change_a_value(database: Any) -> None:
    database["metrics"].update_one({"run_id": 1400}, {"$set": {"values.1": 2.0000001}})


def add_a_point(database: Any) -> None:
    again = {"steps": 3, "values": 3.0, "timestamps": None}
    database["metrics"].update_one({"run_id": 1400}, {"$push": again})


def shorten_an_artifact(database: Any) -> None:
    (file,) = database["fs.files"].find({"filename": "artifact://runs/1400/a.bin"})
    database["fs.chunks"].update_one({"files_id": file["_id"]}, {"$set": {"data": b"0"}})


@pytest.mark.parametrize("change", [change_status, lose_the_run, lose_points, lose_all_points,
                                    change_a_value, add_a_point, shorten_an_artifact])  # fmt: skip
def test_what_is_stored_is_read_back(tmp_path: Path, database: Any, change: Any) -> None:
    losses = [1.0, 2.0, math.nan]
    upload = Uploader(JournalReader(write_journal(tmp_path / "r", 1400, losses)), database)
    upload.upload()
    upload.verify()
    change(database)
    with pytest.raises(TrackingError, match="the database has lost"):
        upload.verify()
    upload.upload()
    upload.verify()
    assert str(points(database, 1400)) == "{'loss': [1.0, 2.0, nan]}"
    assert database["runs"].find_one({"_id": 1400})["status"] == "COMPLETED"
    for name in ("runs", "metrics", "fs.files", "fs.chunks"):
        database[name].delete_many({})


NONSENSE = {"ok": 1.0, "n": "many", "nModified": None, "cursor": {"firstBatch": "x", "id": 0}}


@pytest.mark.parametrize("command", ["", "ping", "find", "update", "insert"])
def test_what_is_not_stored_keeps_its_journal(tmp_path: Path, command: str) -> None:
    """A server that forgets all that it takes, and says so or answers nonsense."""
    path = write_journal(tmp_path / "r", 1, [1.0])
    with FakeMongod({command: NONSENSE}) as server:
        client: Any = pymongo.MongoClient(server.address, serverSelectionTimeoutMS=5000)
        with pytest.raises(Exception):  # noqa: B017  (of pymongo, any)
            upload_journal(path, client["lab"])
        client.close()
    assert path.exists()


def test_a_number_taken_by_another_run_is_replaced(tmp_path: Path, database: Any) -> None:
    first = write_journal(tmp_path / "one", 1200, [1.0])
    second = write_journal(tmp_path / "two", 1200, [2.0])
    uploads = [upload_journal(path, database) for path in (first, second)]
    assert [upload.run_id for upload in uploads if upload] == [1200, 1201]
    assert points(database, 1201) == {"loss": [2.0]}
    assert not first.exists() and not second.exists()


def test_a_long_series_goes_on_in_a_second_document(
    tmp_path: Path, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "POINTS_PER_DOCUMENT", 2)
    upload_journal(write_journal(tmp_path / "r", 1300, [1.0, 2.0, 3.0, 4.0, 5.0]), database)
    stored = {m["name"]: m["values"] for m in database["metrics"].find({"run_id": 1300})}
    assert stored == {"loss": [1.0, 2.0], "loss (2)": [3.0, 4.0], "loss (3)": [5.0]}


def test_a_journal_in_use_is_left_alone(tmp_path: Path, database: Any) -> None:
    journal = Journal(tmp_path / "r", {"token": "t"})
    assert upload_journal(journal.path, database) is None
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.close()


def small_journal(path: Path, sealed: bool = True) -> list[bytes]:
    """The lines of a journal whose run has ended; sealed by its process, or not."""
    journal = Journal(path, {"token": "t", "database": "embedded", "host": platform.node()})
    document = {"_id": 1500, "meta": {"journal": "t"}, "status": "RUNNING", "info": {}}
    journal.append({"start": {**document, "artifacts": [], "captured_out": ""}})
    for step in range(4):
        journal.append({"metric": "loss", "step": step, "value": 0.5 + step, "time": NOW})
    journal.append({"set": {"status": "COMPLETED", "result": math.nan}})
    if sealed:
        journal.seal()
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def read(path: Path) -> tuple[int, str]:
    """How many entries are read, and the damage."""
    with closing(JournalReader(path)) as reader:
        return len(list(reader.entries())), reader.damage


def test_every_change_of_a_journal_is_noticed(tmp_path: Path) -> None:
    """Each byte changed, lost or doubled, cut off at each; each line lost, doubled or moved."""
    path = tmp_path / "r"
    lines = small_journal(path)
    whole = path.read_bytes()
    assert read(path) == (6, "")
    changed = []
    for i, byte in enumerate(whole):
        before, after = whole[:i], whole[i + 1 :]
        changed += [[before, bytes([byte ^ 1 << i % 8]), after], [before, after]]
        changed += [[before, bytes(40), whole[i + 40 :]], [before]]
        changed += [[before, whole[i : i + 1] * 2, after]] if i < len(whole) - 1 else []
    for i in range(len(lines)):
        changed += [[*lines[:i], *lines[i + 1 :]], [*lines[:i], lines[i], *lines[i:]]]
    changed += [[*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]] for i in range(5)]
    for pieces in changed:
        path.write_bytes(b"".join(pieces))
        assert read(path)[1], pieces


def damaged(lines: list[bytes], how: str) -> bytes:
    if how == "cut off":
        return b"".join(lines[:4])
    if how == "a digit":  # it can still be parsed
        assert b"2.5" in lines[4]
        return b"".join([*lines[:4], lines[4].replace(b"2.5", b"2.4"), *lines[5:]])
    return b"".join([*lines[:4], *([lines[4]] * (2 if how == "a line twice" else 0)), *lines[5:]])


@pytest.mark.parametrize("how", ["a digit", "a line lost", "a line twice", "cut off"])
def test_a_damaged_journal_is_told_marked_and_kept(
    data: Path, database: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the next run, then by hand."""
    path = data / "journals" / "run-t.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(small_journal(path), how))
    code, output = run(environment(data), "with", "quick")
    kept, line = path.with_name("run-t.jsonl.damaged"), 6 if how == "a line twice" else 5
    assert code == 0 and f"a part of run 1500 is lost: of its journal line {line}" in output
    assert str(kept) in output and kept.exists() and not path.exists()
    stored = database["runs"].find_one({"_id": 1500})
    assert stored["status"] == "FAILED"
    assert stored["fail_trace"][0].startswith("a part of the record is lost")
    assert len(points_of(database, 1500)) == (2 if how == "cut off" else line - 2)
    code, output = run(environment(data), str(kept), module="experiments.tracking.upload")
    assert code == 1 and "a part of run 1500 is lost" in output and kept.exists()
    assert database["runs"].find_one({"_id": 1500})["status"] == "FAILED"
    kept.unlink()
    database["runs"].delete_one({"_id": 1500})
    database["metrics"].delete_many({"run_id": 1500})


def test_a_journal_without_its_beginning(data: Path, database: Any) -> None:
    """Without the start the run is marked; without the header it is uploaded by hand."""
    path = data / "journals" / "run-t.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = small_journal(path)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    database["runs"].insert_one({"_id": 1500, "meta": {"journal": "t"}, "status": "RUNNING"})
    code, output = run(environment(data), "with", "quick")
    assert code == 0 and "run-t.jsonl is not the journal of a run, or its beginning" in output
    stored = database["runs"].find_one({"_id": 1500})
    assert stored["status"] == "FAILED" and stored["fail_trace"] == ["line 2 is damaged or missing"]
    database["runs"].delete_one({"_id": 1500})
    path.write_bytes(b"".join(lines[1:]))
    code, output = run(environment(data), "with", "quick")
    assert code == 0 and "Cannot upload run-t.jsonl: its beginning is damaged" in output
    code, output = run(environment(data), str(path), module="experiments.tracking.upload")
    assert code == 1 and "a part of run 1500 is lost: of its journal line 1" in output
    assert points_of(database, 1500) == [0.5, 1.5, 2.5, 3.5]
    path.with_name("run-t.jsonl.damaged").unlink()
    database["runs"].delete_one({"_id": 1500})
    database["metrics"].delete_many({"run_id": 1500})


def points_of(database: Any, number: int) -> list[float]:
    return list(database["metrics"].find_one({"run_id": number, "name": "loss"})["values"])


def test_a_journal_cut_afterwards_takes_nothing_from_the_database(
    tmp_path: Path, database: Any
) -> None:
    path = tmp_path / "r"
    lines = small_journal(path, sealed=False)
    path.write_bytes(b"".join(lines[:-1]))
    upload = Uploader(JournalReader(path), database)
    upload.upload()
    path.write_bytes(b"".join(lines[:4]))
    ended = upload_journal(path, database)
    assert ended is not None and ended.document["status"] == "FAILED" and not path.exists()
    assert points_of(database, 1500) == [0.5, 1.5, 2.5, 3.5]


def test_what_is_whole_in_the_database_stays_so(tmp_path: Path, database: Any) -> None:
    path = tmp_path / "r"
    lines = small_journal(path)
    Uploader(JournalReader(path), database).upload()
    before = database["runs"].find_one({"_id": 1500})
    path.write_bytes(damaged(lines, "a line lost"))
    with pytest.raises(TrackingError, match="the rest is in the database, as COMPLETED"):
        upload_journal(path, database)
    after = database["runs"].find_one({"_id": 1500})
    assert str(after) == str(before) and points_of(database, 1500) == [0.5, 1.5, 2.5, 3.5]


def test_a_line_that_cannot_be_written_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes a part of a line."""
    journal, real = Journal(tmp_path / "r", {"token": "t"}), os.pwrite
    journal.append({"set": {"a": 1}})
    monkeypatch.setattr(os, "pwrite", lambda file, line, at: real(file, line[:9], at))
    with pytest.raises(TrackingError, match="the record cannot be written"):
        journal.append({"set": {"b": 1}})
    monkeypatch.undo()
    journal.append({"set": {"status": "COMPLETED"}})
    journal.seal()
    journal.close()
    assert read(tmp_path / "r") == (2, "")


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    lines = small_journal(tmp_path / "r")
    (tmp_path / "r").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    with closing(JournalReader(tmp_path / "r")) as reader, open(tmp_path / "r", "ab") as file:
        assert len(list(reader.entries())) == 2 and not list(reader.entries())
        assert reader.damage  # as long as it has not come
        file.write(lines[3][20:] + b"".join(lines[4:]))
        file.flush()
        assert len(list(reader.entries())) == 4 and not reader.damage


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]", b"null\n", bytes(5000), b"\xff\n" * 9])
def test_a_strange_file_is_no_journal(data: Path, database: Any, content: bytes) -> None:
    path = data / "journals" / "run-strange.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    code, output = run(environment(data), "with", "quick")
    assert code == 0 and f"Cannot upload {path.name}: " in output
    code, output = run(environment(data), str(path), module="experiments.tracking.upload")
    assert code == 1 and "is not the journal of a run" in output and output.count("\n") == 1
    assert path.read_bytes() == content
    path.unlink()


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.int64(2), np.array([[2.0]]), torch.tensor(2.0),
     torch.ones(1, requires_grad=True) * 2],
)
def test_scalars_of_every_kind_are_numbers(value: Any) -> None:
    assert as_number("loss", value) == 2 and type(as_number("loss", value)) in (int, float)


@pytest.mark.parametrize("value", [None, "2", [2.0], np.zeros(2), torch.zeros(0), 1j])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="metric 'loss' must be a number"):
        as_number("loss", value)


def test_steps_are_whole_numbers() -> None:
    assert (as_step("loss", np.int32(3)), as_step("loss", None)) == (3, None)
    for step in (0.5, 2**63):
        with pytest.raises(TypeError, match=f"'loss' must be an int of 64 bits, got {step}"):
            as_step("loss", step)


@pytest.mark.parametrize("name", ["", "a.b", "$a", "a\0", "\udc80", 3, None])
def test_a_name_that_cannot_be_stored_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="a metric's name is a string such as 'train/loss'"):
        check_name(name)


def test_text_that_mongodb_cannot_hold_is_escaped(tmp_path: Path, database: Any) -> None:
    text = {"a\0b\udc80": "\udc80", "list": ["x\ud800"]}
    database["odd"].insert_one({"_id": 1, "value": storable(text)})
    kept = database["odd"].find_one({"_id": 1})["value"]
    assert kept == {"a\\0b\\udc80": "\\udc80", "list": ["x\\ud800"]}


def test_anything_becomes_plain_data() -> None:
    value = {1: np.float64(0.5), "big": 2**70, "a": np.arange(2), "t": (torch.ones(2), {3})}
    plain = {"1": 0.5, "big": str(2**70), "a": [0, 1], "t": [[1.0, 1.0], [3]]}
    assert storable(value) == plain and type(storable(value)["1"]) is float
    assert isinstance(storable(threading.Event()), (dict, str))


def test_output_is_drawn_and_cut() -> None:
    assert keep_output("a 1%\ra 2%\nb\n") == "a 2%\nb\n"
    assert keep_output("a 2%\r") == "a 2%\r"
    text = ""
    for chunk in range(30):
        text = keep_output(text + str(chunk % 10) * 100_000)
    assert len(text) == HEAD + len(CUT) + TAIL and text.count("output cut here") == 1
    assert text.startswith("0") and text.endswith("9" * 100_000)


def test_what_is_printed_is_read_once_and_not_kept() -> None:
    tape, read = Tape(), []
    writers = [threading.Thread(target=lambda: [tape.write("x") for _ in range(5000)])
               for _ in range(4)]  # fmt: skip
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read.append(tape.read())
    read.append(tape.read())
    assert sum(map(len, read)) == 20_000 and tape.read() == ""


@pytest.mark.parametrize("fault", ["info", "long", "user"])
def test_what_a_run_leaves(data: Path, database: Any, fault: str) -> None:
    code, output = run(environment(data), "with", "quick", f"fault={fault}")
    assert code == (fault == "user"), output
    stored = database["runs"].find_one({}, sort=[("start_time", -1)])
    assert stored["status"] == ("FAILED" if code else "COMPLETED")
    if fault == "info":
        info = stored["info"]
        assert (info["huge"], info["scalar"], info["array"]) == (str(2**80), 0.5, [0, 1, 2])
        assert stored["result"] == 0.5
    elif fault == "long":
        kept = stored["captured_out"]
        assert len(kept) == HEAD + len(CUT) + TAIL
        assert kept.startswith("begin") and kept.endswith("end\n")
    else:
        assert "told to fail" in "".join(stored["fail_trace"])


def test_hostport_option(data: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    server.start()
    assert run(environment(data), "-m", f"{server.address}:other", "with", "quick")[0] == 0
    client: Any = pymongo.MongoClient(server.address)
    other = client["other"]
    assert other["runs"].distinct("status") == ["COMPLETED"]
    assert "run_id_1_name_1" in other["metrics"].index_information()
    names = {name for name, _ in other["runs"].find_one()["experiment"]["sources"]}
    assert {"tests/helpers/toy_experiment.py", "experiments/tracking/observer.py"} <= names
    client.close()
    server.kill()


def test_a_run_whose_points_were_deleted_meanwhile_is_whole_in_the_end(
    data: Path, database: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    database["runs"].delete_many({})
    process = start(environment(data), "-b", "0.1", "with", "steps=9", f"hold={gate}")
    wait_for(lambda: database["metrics"].find_one({"run_id": 1, "steps": {"$size": 5}}))
    database["metrics"].delete_many({})
    gate.touch()
    code, output = finish(process)
    assert code == 0, output
    assert points(database, 1)["train/loss"] == [1 / (1 + step) for step in range(9)]


class Broken(RunObserver):
    """An observer of somebody else's that fails."""

    def heartbeat_event(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")


def test_a_failed_observer_of_others_is_an_error(data: Path, database: Any) -> None:
    experiment = TrackedExperiment("other")
    experiment.observers.append(Broken())
    experiment.main(lambda: None)
    with pytest.raises(TrackingError, match="Broken failed"):
        experiment.run()
    assert database["runs"].find_one({"experiment.name": "other"})["status"] == "COMPLETED"
