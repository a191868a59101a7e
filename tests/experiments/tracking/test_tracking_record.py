"""The journal, its upload, and what may be recorded."""

import _thread
import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pymongo
import pytest
import torch
from bson import ObjectId
from fake_mongod import FakeMongod
from pytest import MonkeyPatch
from sacred.observers import RunObserver
from toy_process import Server, journals, points, run, write_journal

from experiments.tracking import (
    Terminated,
    TrackedExperiment,
    TrackingError,
    uploader,
    values,
)
from experiments.tracking.journal import LINE_LIMIT, Journal, JournalReader
from experiments.tracking.observer import JournalObserver
from experiments.tracking.uploader import Uploader, upload_journal

pytest_plugins = ("toy_process",)
UPLOAD = "experiments.tracking.upload"
LONGEST = values.HEAD + len(values.CUT) + values.TAIL
ARTIFACT = bytes(300_000)  # two chunks


@pytest.fixture
def journal(home: Path) -> Iterator[Path]:
    """Where the next run of the data folder looks for an abandoned journal."""
    path = home / "journals" / "run-t.jsonl"
    path.parent.mkdir(exist_ok=True)
    yield path
    for left in path.parent.glob("run-t*"):
        left.unlink()


def change_points(database: Any, **points: Any) -> None:
    pushed = {key: points for key in ("steps", "values", "timestamps")}
    database["metrics"].update_one({}, {"$push": pushed})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "its status": lambda d: d["runs"].update_one({}, {"$set": {"status": "FAILED"}}),
    "the run": lambda d: d["runs"].delete_one({}),
    "points": lambda d: change_points(d, **{"$each": [], "$slice": 1}),
    "all points": lambda d: change_points(d, **{"$each": [], "$slice": 0}),
    "a value": lambda d: d["metrics"].update_one({}, {"$set": {"values.1": 2.0000001}}),
    "a point more": lambda d: change_points(d, **{"$each": [3]}),
    "an artifact": lambda d: d["fs.chunks"].update_one({}, {"$set": {"data": b"0"}}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_stored_is_read_back(tmp_path: Path, database: Any, what: str) -> None:
    """And an upload may be repeated, by another process too."""
    write_journal(tmp_path / "r", 1400, [1.0, 2.0, math.nan, math.inf], ARTIFACT)
    for _ in range(2):
        upload = Uploader(JournalReader(tmp_path / "r"), database)
        upload.upload()
        upload.verify()
    CHANGES[what](database)
    with pytest.raises(TrackingError, match="the database has lost"):
        upload.verify()
    upload.upload()
    upload.verify()
    stored = database["runs"].find_one({"_id": 1400})
    assert (stored["status"], stored["captured_out"]) == ("COMPLETED", "abd")
    assert [item["name"] for item in stored["artifacts"]] == ["a.bin"]
    assert str(points(database, 1400)) == "{'loss': [1.0, 2.0, nan, inf]}"
    assert database["fs.files"].count_documents({"filename": "artifact://runs/1400/a.bin"}) == 1
    (metric,) = stored["info"]["metrics"]
    assert database["metrics"].find_one({"_id": ObjectId(metric["id"])})["name"] == "loss"


NONSENSE = {"ok": 1.0, "n": "many", "nModified": None, "cursor": {"firstBatch": "x", "id": 0}}


@pytest.mark.parametrize("command", ["", "ping", "find", "update", "insert"])
def test_what_is_not_stored_keeps_its_journal(tmp_path: Path, command: str) -> None:
    """A server that forgets all that it takes, and says so or answers nonsense."""
    write_journal(tmp_path / "r", 1, [1.0], ARTIFACT)
    with FakeMongod({command: NONSENSE}) as server:
        client: Any = pymongo.MongoClient(server.address, serverSelectionTimeoutMS=5000)
        with closing(client), pytest.raises(Exception):  # noqa: B017  (of pymongo, any)
            upload_journal(tmp_path / "r", client["lab"])
    assert (tmp_path / "r").exists()


def test_a_number_taken_by_another_run_is_replaced(tmp_path: Path, database: Any) -> None:
    for name, number, loss in (("one", 1200, 1.0), ("two", 1201, 2.0)):
        write_journal(tmp_path / name, 1200, [loss])
        upload = upload_journal(tmp_path / name, database)
        assert upload is not None and upload.run_id == number
        assert points(database, number) == {"loss": [loss]} and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["/x", "..", "\x1b[31m", "x" * 300, {"$ne": 0}, 1.5, 2**62 - 1])
@pytest.mark.parametrize("token", ["theirs", {"$ne": 1}])
def test_a_journal_of_others_changes_no_other_run(
    tmp_path: Path, database: Any, name: Any, token: Any
) -> None:
    """Nor does it name one as no folder may be called or none could follow, or trip over one of a
    wrong shape."""
    runs, mine = database["runs"], {"_id": 1, "meta": {"journal": "mine"}, "status": "COMPLETED"}
    runs.insert_many([mine, {"_id": 2, "meta": None}])
    start = {"meta": {"journal": token}, "status": "RUNNING", "info": {}, "artifacts": []}
    for wanted in (name, 2):
        with closing(Journal(tmp_path / "r", {"token": token})) as journal:
            journal.append({"start": {"_id": wanted, **start}})
            journal.append({"set": {"status": "COMPLETED"}})
            journal.seal()
        uploaded = upload_journal(tmp_path / "r", database)
        assert uploaded is not None and uploaded.run_id == 3
    assert runs.find_one({"_id": 1}) == mine and runs.find_one({"_id": 2})["meta"] is None


def test_a_long_series_goes_on(tmp_path: Path, database: Any, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "POINTS_PER_DOCUMENT", 2)
    write_journal(tmp_path / "r", 1300, [1.0, 2.0, 3.0, 4.0, 5.0])
    upload_journal(tmp_path / "r", database)
    stored = {m["name"]: m["values"] for m in database["metrics"].find({"run_id": 1300})}
    assert stored == {"loss": [1.0, 2.0], "loss (2)": [3.0, 4.0], "loss (3)": [5.0]}


def test_a_journal_in_use_is_left_alone(tmp_path: Path, database: Any) -> None:
    with closing(Journal(tmp_path / "r", {"token": "t"})) as journal:
        assert upload_journal(journal.path, database) is None
        assert journal.path.stat().st_mode & 0o777 == 0o600


def read(path: Path) -> tuple[int, str]:
    """How many entries are read, and the damage."""
    with closing(JournalReader(path)) as reader:
        return len(list(reader.entries())), reader.damage


def test_every_change_of_a_journal_is_noticed(tmp_path: Path) -> None:
    """Each byte changed, lost or doubled, cut off at each; each line lost, doubled or moved."""
    path = tmp_path / "r"
    lines = write_journal(path)
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


@pytest.mark.parametrize(("how", "left"), [("a digit", 3), ("cut off", 2)])
def test_a_damaged_journal_is_told_marked_and_kept(
    home: Path, database: Any, journal: Path, how: str, left: int
) -> None:
    """By the next run, then by hand."""
    *first, fifth, sixth, last = write_journal(journal)
    changed = fifth.replace(b"2.5", b"2.4")  # it can still be parsed
    journal.write_bytes(b"".join([*first, *([changed, sixth, last] if how == "a digit" else [])]))
    code, output = run(home, "with", "quick")
    kept = journal.with_name("run-t.jsonl.damaged")
    assert code == 0 and "a part of run 1500 is lost: of its journal line 5" in output
    assert str(kept) in output and kept.exists() and not journal.exists()
    stored = database["runs"].find_one({"_id": 1500})
    (loss,) = database["metrics"].find({"run_id": 1500})
    assert stored["status"] == "FAILED" and len(loss["values"]) == left
    assert stored["fail_trace"][0].startswith("a part of the record is lost")
    code, output = run(home, str(kept), module=UPLOAD)
    assert code == 1 and "a part of run 1500 is lost" in output and kept.exists()
    assert database["runs"].find_one({"_id": 1500})["status"] == "FAILED"


def test_a_second_damaged_journal_replaces_none(tmp_path: Path, database: Any) -> None:
    lines = write_journal(tmp_path / "r")
    for name in ("r.damaged", "r.damaged.damaged"):
        (tmp_path / "r").write_bytes(b"".join(lines[:-1]))
        with pytest.raises(TrackingError, match=f"kept: {tmp_path / name}$"):
            upload_journal(tmp_path / "r", database)
        (tmp_path / name).write_text(name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "r.damaged": "r.damaged", "r.damaged.damaged": "r.damaged.damaged"
    }  # fmt: skip


RUNS = '{"_id": 1, "meta": {"journal": "t"}, "status": "RUNNING", "info": {}, "artifacts": []'
POINT = '{"metric": "loss", "step": 0, "value": 1.0, "time": {"$date": "2026-01-01T00:00:00Z"}}'
FILE = ('{"artifact": "a", "id": {"$oid": "65a000000000000000000001"}, "metadata": null,'
        ' "data": {"$binary": {"base64": "AAAA", "subType": "00"}}, "content_type": null}')
FOREIGN = {
    "a value that MongoDB lacks": RUNS.replace('"_id": 1', f'"_id": {10**30}'),
    "a list of settings": RUNS + ', "config": [1]', "text as a time": RUNS + ', "heartbeat": "now"',
    "no journal's name": RUNS.replace('"journal": "t"', ""), "nothing to list files in": RUNS[:-17],
    "a list": "[1]", "a text": '"metric"', "null": "null", "no JSON": '{"set": ', "NUL": "\0",
    "no UTF-8": b'{"set": {"a": "\xff"}}', "a name twice": '{"set": {"a": 1, "a": 2}}',
    "another entry": '{"x": 1}', "a second beginning": f'{{"start": {RUNS}}}}}',
    "an operator": '{"set": {"$inc": 1}}', "a part of a field": '{"set": {"info.x": 1}}',
    "another run": '{"set": {"_id": 2}}', "NUL in a name": '{"set": {"info": {"\\u0000": 1}}}',
    "half a letter": '{"set": {"result": "\\ud800"}}', "deep": f'{{"set": {"[" * 10**5}',
    "a point of text": POINT.replace("1.0", '"x"'), "a huge point": POINT.replace("1.0", "9" * 30),
    "a step between": POINT.replace("0,", "0.5,"), "a point at no time": POINT[:42] + "}",
    "a point of a list": POINT.replace('"loss"', "[1]"), "an output": '{"output": [1, 2]}',
    "no date": '{"set": {"result": {"$date": "x"}}}',
    "no number": '{"set": {"result": {"$oid": 1}}}',
    "no code": '{"set": {"result": {"$code": "x", "$scope": 1}}}', "no end": "x" * LINE_LIMIT,
    "a file of text": FILE.replace('{"$binary": {"base64": "AAAA", "subType": "00"}}', '"AAAA"'),
    "a file by a question": FILE.replace("$oid", "ne"), "a bare file": '{"artifact": "a"}',
}  # fmt: skip
"""Lines that no run has written: a journal's second or, behind a point, its fourth."""


@pytest.mark.parametrize("name", FOREIGN)
def test_a_line_that_no_run_has_written_is_named(tmp_path: Path, database: Any, name: str) -> None:
    """Nothing is uploaded of its file, which stays as it is."""
    line, begins = FOREIGN[name], str(FOREIGN[name]).startswith(RUNS[:5])
    texts: list[Any] = ['{"token": "t", "lines": "000000000003"}', f'{{"start": {line}}}}}']
    if not begins:
        texts[1:] = [f'{{"start": {RUNS}}}}}', POINT, line]
    path, content = tmp_path / "r", b""
    for number, text in enumerate([*texts, '{"set": {"status": "COMPLETED"}}']):
        entry = text if isinstance(text, bytes) else text.encode()
        check = hashlib.blake2b(b"%d %s" % (number, entry), digest_size=12).hexdigest().encode()
        content += b'{"line": %d, "check": "%s", "entry": %s}\n' % (number, check, entry)
    path.write_bytes(content)
    with pytest.raises(TrackingError, match=f"r, line {2 if begins else 4}: expected what a run"
                       " writes there, got .*; the file is left as it is") as refused:  # fmt: skip
        upload_journal(path, database)
    assert "\n" not in str(refused.value) and path.read_bytes() == content
    assert not any(database[name].count_documents({}) for name in database.list_collection_names())


def test_a_journal_of_nothing_but_a_beginning_and_an_end(tmp_path: Path, database: Any) -> None:
    """A run's beginning is missing, of which no line is."""
    with closing(Journal(tmp_path / "r", {"token": "t"})) as journal:
        journal.append({"set": {"status": "COMPLETED"}})
        journal.seal()
    with pytest.raises(TrackingError, match="is not the journal of a run"):
        upload_journal(tmp_path / "r", database)
    assert (tmp_path / "r").exists()


def test_a_journal_without_its_beginning(home: Path, database: Any, journal: Path) -> None:
    """Without the start the run is marked; without the header it is uploaded by hand."""
    lines = write_journal(journal)
    journal.write_bytes(b"".join([lines[0], *lines[2:]]))
    own = {"_id": 1500, "meta": {"journal": journal.name}, "status": "RUNNING"}
    database["runs"].insert_one(own)
    code, output = run(home, "with", "quick")
    assert code == 0 and "run-t.jsonl is not the journal of a run, or its beginning" in output
    stored = database["runs"].find_one({"_id": 1500})
    assert stored["status"] == "FAILED" and stored["fail_trace"] == ["line 2 is damaged or missing"]
    database["runs"].delete_one({"_id": 1500})
    journal.write_bytes(b"".join(lines[1:]))
    code, output = run(home, "with", "quick")
    assert code == 0 and "Cannot upload run-t.jsonl: its beginning is damaged" in output
    code, output = run(home, str(journal), module=UPLOAD)
    assert code == 1 and "a part of run 1500 is lost: of its journal line 1" in output
    assert points(database, 1500)["loss"] == [0.5, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(("status", "last"), [
    ("FAILED", -1), ("COMPLETED", None), ("COMPLETED", 7),
], ids=["cut afterwards", "a backup", "a line lost"])  # fmt: skip
def test_a_journal_that_holds_less_takes_nothing_away(
    tmp_path: Path, database: Any, status: str, last: int | None
) -> None:
    """What was uploaded first, of lines up to the last, stays, whole or as far as it had come."""
    path, sealed = tmp_path / "r", last == 7
    lines = write_journal(path, sealed=sealed)
    path.write_bytes(b"".join(lines[:last]))
    Uploader(JournalReader(path), database).upload()
    before = database["runs"].find_one({"_id": 1500})
    path.write_bytes(b"".join([*lines[:4], *lines[5 : 99 * sealed]]))
    if sealed:
        with pytest.raises(TrackingError, match="the rest is in the database, as COMPLETED"):
            upload_journal(path, database)
    else:
        ended = upload_journal(path, database)
        assert ended is not None and ended.document["status"] == status and not path.exists()
        assert (ended.how_it_ended() == "") == (status == "COMPLETED")
    after = database["runs"].find_one({"_id": 1500})
    assert after["status"] == status and points(database, 1500)["loss"] == [0.5, 1.5, 2.5, 3.5]
    assert status == "FAILED" or str(after) == str(before)


def test_half_a_written_line_leaves_no_trace(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A full disk takes a part of a line."""
    with closing(Journal(tmp_path / "r", {"token": "t"})) as journal:
        journal.append({"set": {"a": 1}})
        with monkeypatch.context() as patch:
            real = os.pwrite
            patch.setattr(os, "pwrite", lambda file, line, at: real(file, line[:9], at))
            with pytest.raises(TrackingError, match="the record cannot be written"):
                journal.append({"set": {"b": 1}})
        journal.append({"set": {"status": "COMPLETED"}})
        journal.seal()
    assert read(tmp_path / "r") == (2, "")


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    lines = write_journal(tmp_path / "r")
    (tmp_path / "r").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    with closing(JournalReader(tmp_path / "r")) as reader, open(tmp_path / "r", "ab") as file:
        assert len(list(reader.entries())) == 2 and not list(reader.entries())
        assert reader.damage  # as long as it has not come
        file.write(lines[3][20:] + b"".join(lines[4:]))
        file.flush()
        assert len(list(reader.entries())) == 4 and not reader.damage


def test_what_may_not_end_is_no_journal(tmp_path: Path, database: Any) -> None:
    os.mkfifo(tmp_path / "r")
    for path in (tmp_path / "r", Path("/dev/zero"), tmp_path):
        with pytest.raises(TrackingError, match="is no regular file"):
            upload_journal(path, database)


def test_a_journal_of_nothing_but_a_header(home: Path, database: Any, tmp_path: Path) -> None:
    """Of a run that was killed at its very start; it is named, and removed."""
    Journal(tmp_path / "r", {"token": "t"}).close()
    code, output = run(home, str(tmp_path / "r"), module=UPLOAD)
    assert (code, output) == (0, f"{tmp_path}/r: its run had recorded nothing when it was killed\n")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("content", [b"", b"{}\n", bytes(5000)])
def test_what_is_no_journal(home: Path, database: Any, journal: Path, content: bytes) -> None:
    journal.write_bytes(content)
    code, output = run(home, "with", "quick")
    assert code == 0 and f"Cannot upload {journal.name}: " in output
    code, output = run(home, str(journal), module=UPLOAD)
    assert code == 1 and "is not the journal of a run" in output and output.count("\n") == 1
    assert journal.read_bytes() == content


TWO = [2, 2.0, np.float32(2), np.int64(2), np.array([[2.0]]), torch.tensor(2.0),
       torch.ones(1, requires_grad=True) * 2]  # fmt: skip


def test_scalars_of_every_kind_are_numbers_and_steps_whole_ones() -> None:
    for number in (values.as_number("loss", two) for two in TWO):
        assert number == 2 and type(number) in (int, float)
    assert (values.as_step("loss", np.int32(3)), values.as_step("loss", None)) == (3, None)


@pytest.mark.parametrize(("check", "wrong", "error", "message"), [
    (partial(values.as_number, "loss"), [None, "2", [2.0], np.zeros(2), torch.zeros(0), 1j],
     TypeError, "metric 'loss' must be a number"),
    (partial(values.as_step, "loss"), [0.5, 2**63], TypeError, "must be an int of 64 bits, got"),
    (values.check_name, ["", "a.b", "$a", "a\0", "\udc80", 3, None], ValueError,
     "a metric's name is a string such as 'train/loss'"),
])  # fmt: skip
def test_what_cannot_be_stored(check: Any, wrong: list[Any], error: Any, message: str) -> None:
    for value in wrong:
        with pytest.raises(error, match=message):
            check(value)


def test_anything_becomes_plain_data(database: Any) -> None:
    value = {1: np.float64(0.5), "big": 2**70, "a": np.arange(2), "t": (torch.ones(2), {3}),
             "a\0b\udc80": "\udc80", "list": ["x\ud800"], "$oid": {"$a$": 1}}  # fmt: skip
    plain = {"1": 0.5, "big": str(2**70), "a": [0, 1], "t": [[1.0, 1.0], [3]],
             "a\\0b\\udc80": "\\udc80", "list": ["x\\ud800"], "@oid": {"@a$": 1}}  # fmt: skip
    assert values.storable(value) == plain and type(values.storable(value)["1"]) is float
    assert isinstance(values.storable(threading.Event()), (dict, str))
    growing: dict[str, Any] = {"a": SimpleNamespace(tolist=lambda: growing.update(b=1) or [1])}
    assert values.storable(growing) == {"a": [1]}
    database["odd"].insert_one({"_id": 1, "value": values.storable(value)})
    assert database["odd"].find_one({"_id": 1})["value"] == plain


def test_output_is_drawn_and_cut() -> None:
    assert values.keep_output("a 1%\ra 2%\nb\n") == "a 2%\nb\n"
    assert values.keep_output("a 2%\r") == "a 2%\r"
    text = ""
    for chunk in range(30):
        text = values.keep_output(text + str(chunk % 10) * 100_000)
    assert len(text) == LONGEST and text.count("output cut here") == 1
    assert text.startswith("0") and text.endswith("9" * 100_000)


def test_what_is_printed_is_read_once_and_not_kept() -> None:
    tape, read = values.Tape(), []
    writers = [threading.Thread(target=lambda: [tape.write("x") for _ in range(5000)])
               for _ in range(4)]  # fmt: skip
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read.append(tape.read())
    read.append(tape.read())
    assert sum(map(len, read)) == 20_000 and tape.read() == ""


def test_what_a_run_leaves(home: Path, database: Any) -> None:
    """One that completes, and one that fails."""
    assert [run(home, "with", "quick", f"fault={fault}")[0] for fault in ("odd", "user")] == [0, 1]
    whole, failed = database["runs"].find().sort("_id", 1)
    assert (whole["status"], failed["status"]) == ("COMPLETED", "FAILED")
    info, kept = whole["info"], whole["captured_out"]
    assert (info["huge"], info["scalar"], info["array"]) == (str(2**80), 0.5, [0, 1, 2])
    assert whole["result"] == 0.5
    assert len(kept) == LONGEST and kept.startswith("begin") and kept.endswith("end\n")
    assert "told to fail" in "".join(failed["fail_trace"])


def test_hostport_option(home: Path, server: Server) -> None:
    assert run(home, "-m", f"{server.address}:other", "with", "quick")[0] == 0
    with closing(pymongo.MongoClient(server.address)) as client:
        other: Any = client["other"]
        assert other["runs"].distinct("status") == ["COMPLETED"]
        assert "run_id_1_name_1" in other["metrics"].index_information()
        names = {name for name, _ in other["runs"].find_one()["experiment"]["sources"]}
    assert {"tests/helpers/toy_experiment.py", "experiments/tracking/observer.py"} <= names


def test_a_large_artifact_is_recorded_by_its_path(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """As the parameters of resnet12 are."""
    monkeypatch.setattr("experiments.tracking.experiment.LARGEST_ARTIFACT", 5)
    files = {name: tmp_path / name for name in ("small", "large")}
    for name, file in files.items():
        file.write_text(name if name == "small" else 9 * name)
    other = TrackedExperiment("other")

    @other.main
    def main(_run: Any) -> None:
        for file in files.values():
            _run.add_artifact(file)

    info = other.run(options={"--unobserved": True}).info
    md5 = hashlib.md5(files["large"].read_bytes()).hexdigest()
    assert info["large_artifacts"] == [{"path": str(files["large"]), "md5": md5}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_upload_that_breaks_off_keeps_the_journal(
    home: Path, database: Any, monkeypatch: MonkeyPatch
) -> None:
    """By whatever: only what has been read back counts as stored."""
    experiment = TrackedExperiment("broken off")
    experiment.main(lambda: None)
    monkeypatch.setattr(uploader.Uploader, "verify", lambda self: _thread.exit())
    with pytest.raises(TrackingError, match=f"has broken off.* {UPLOAD} '{home}"):
        experiment.run()
    (kept,) = (home / "journals").glob("run-*.jsonl")
    kept.unlink()


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(("value", "said"), [
    (CIRCLE, "maximum recursion depth"), ("x" * 13 * 2**20, "have 13 MiB, of which a document of"),
    ("a full disk's", "No space left"),
])  # fmt: skip
def test_a_result_that_cannot_be_recorded_costs_nothing_else(
    home: Path, database: Any, monkeypatch: MonkeyPatch, value: Any, said: str
) -> None:
    """But the run is not completed; the disk, too full for it, has room for the end."""
    experiment, append = TrackedExperiment("large"), Journal.append

    @experiment.main
    def main(_run: Any) -> None:
        _run.log_scalar("loss", 0.5)
        _run.info["result"] = value

    def full(self: Journal, entry: dict[str, Any]) -> None:
        if "a full disk's" in entry.get("set", {}).get("info", {}).values():
            raise TrackingError("the record cannot be written (No space left on device)")
        append(self, entry)

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(TrackingError, match="the run's record is not complete"):
        experiment.run()
    (stored,) = database["runs"].find()
    assert stored["status"] == "FAILED" and said in stored["fail_trace"][0]
    assert points(database, stored["_id"])["loss"] == [0.5] and not journals(home)


def test_the_last_record_is_waited_for(home: Path, database: Any, monkeypatch: MonkeyPatch) -> None:
    """On a disk that takes longer than Sacred waits: the end's own upload is not earlier."""
    experiment, finished = TrackedExperiment("slow"), threading.Event()

    @experiment.main
    def main(_run: Any) -> None:
        _run.info["result"] = 1.0

    finish, beat = JournalObserver.finish, JournalObserver.heartbeat_event

    def finishing(self: JournalObserver) -> None:
        finish(self)
        finished.set()

    def slow(self: JournalObserver, *arguments: Any, **more: Any) -> None:
        finished.wait(4.0)
        beat(self, *arguments, **more)

    monkeypatch.setattr(JournalObserver, "finish", finishing)
    monkeypatch.setattr(JournalObserver, "heartbeat_event", slow)
    experiment.run()
    (stored,) = database["runs"].find()
    assert (stored["status"], stored["info"]["result"]) == ("COMPLETED", 1.0)


def test_a_signal_while_the_run_is_inserted(
    home: Path, database: Any, journal: Path, monkeypatch: MonkeyPatch
) -> None:
    """It is no error of the database, nor one of a record that another run has left."""
    experiment, insert = TrackedExperiment("inserted"), JournalObserver.insert
    experiment.main(lambda: None)

    def terminated(*arguments: Any) -> None:
        if arguments[1:]:
            return os.kill(os.getpid(), signal.SIGTERM)
        insert(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(JournalObserver, "insert", terminated)
    with pytest.raises(Terminated):
        experiment.run()
    assert [run["status"] for run in database["runs"].find()] == ["INTERRUPTED"]
    write_journal(journal)
    monkeypatch.setattr(uploader, "upload_journal", terminated)
    with pytest.raises(Terminated):
        experiment.run()
    assert [path.name for path in journal.parent.iterdir()] == [journal.name]
    assert database["runs"].count_documents({}) == 1


def test_a_failed_observer_of_others_is_an_error(
    home: Path, database: Any, monkeypatch: MonkeyPatch
) -> None:
    experiment, observer = TrackedExperiment("other"), RunObserver()
    monkeypatch.setattr(observer, "heartbeat_event", lambda **_: 1 / 0)
    experiment.observers.append(observer)
    experiment.main(lambda: None)
    with pytest.raises(TrackingError, match="RunObserver failed"):
        experiment.run()
    assert database["runs"].find_one({"experiment.name": "other"})["status"] == "COMPLETED"
