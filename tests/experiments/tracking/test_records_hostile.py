"""Files that were never exported: refused in one line, before anything reaches a database."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.tracking.errors import UserError
from experiments.tracking.import_runs import main
from experiments.tracking.records import HEADER, read_records

NUMBER, FILE = {"$oid": "0" * 23 + "1"}, {"$oid": "0" * 23 + "2"}
TIME = {"$date": "2026-01-01T00:00:00Z"}
RUN = {
    "_id": 1, "start_time": TIME, "status": "COMPLETED", "config": {}, "meta": {}, "info": {},
    "host": {}, "artifacts": [], "experiment": {"name": "train", "sources": [["a.py", FILE]]},
}  # fmt: skip
METRIC = {"_id": NUMBER, "run_id": 1, "name": "m", "steps": [1], "values": [0.5],
          "timestamps": [TIME]}  # fmt: skip
SOURCE = {"_id": FILE, "filename": "a.py", "md5": "0cc175b9c0f1b6a831c399e269772661", "text": "a"}
CHOICE = {"_id": "x", "index": 0, "cells": ["c"], "runs": [1], "time": TIME}
CELL = {"_id": "c", "state": "free"}
GOOD = [{"runs": RUN}, {"metrics": METRIC}, {"fs.files": SOURCE}, {"sweep_cells": CELL},
        {"sweep_choices": CHOICE}]  # fmt: skip


def write(path: Path, lines: list[Any], header: Any = HEADER) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in [header, *lines])
    path.write_bytes(gzip.compress(text.encode()))
    return path


def changed(collection: str, **fields: Any) -> list[Any]:
    """The good lines, one document with other fields; None: without the field."""
    lines = copy.deepcopy(GOOD)
    (document,) = [line[collection] for line in lines if collection in line]
    document.update(fields)
    for name in [name for name, value in fields.items() if value is None]:
        del document[name]
    return lines


def test_the_good_file_is_good(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "f", GOOD))
    assert records["fs.files"][0]["data"] == b"a" and len(records["runs"]) == 1


DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]

BAD: dict[str, tuple[list[Any], str]] = {
    "another collection": ([*GOOD, {"system.users": {"_id": 1}}], "expected one of runs, metrics"),
    "two collections": ([{"runs": RUN, "metrics": METRIC}], "expected one collection's document"),
    "no object": ([[1]], "expected one collection's document"),
    "another field": (changed("runs", evil=1), "runs has no field 'evil'"),
    "no status": (changed("runs", status=None), "runs needs a right status"),
    "a run that still runs": (changed("runs", status="RUNNING"), "runs needs a right status"),
    "a number that asks": (changed("runs", _id={"$gte": 0}), "runs needs a right _id"),
    "a start that asks": (changed("runs", start_time={"$ne": 0}), "runs needs a right start_time"),
    "an operator": (changed("runs", config={"a": [{"$where": "1"}]}), "the key '$where' is not"),
    "code": (changed("runs", config={"a": {"$code": "x"}}), "a value of the type Code"),
    "a pattern": (
        changed("runs", config={"a": {"$regularExpression": {"pattern": "x", "options": ""}}}),
        "a value of the type Regex",
    ),
    "a reference": (
        changed("runs", config={"a": {"$ref": "runs", "$id": 1}}), "a value of the type DBRef"
    ),
    "broken extended JSON": (changed("runs", config={"a": {"$oid": "x"}}), "no extended JSON"),
    "bytes": (changed("runs", config={"a": {"$binary": {"base64": "YQ==", "subType": "00"}}}),
              "a value of the type bytes"),
    "a null in a key": (changed("runs", config={"a\0b": 1}), "is not one of a record"),
    "deep": (changed("runs", config={"a": DEEP}), "nested too deeply"),
    "a large number": (changed("runs", config={"a": 2**70}), "a number beyond 64 bits"),
    "an end that is text": (changed("runs", stop_time="soon"), "a run needs a right stop_time"),
    "sources": (changed("runs", experiment={"sources": [["a", 1]]}), "needs a right experiment"),
    "a file that is not there": (GOOD[:2], "a file of run 1 is not in the file"),
    "a metric of another run": (changed("metrics", run_id=2), "a run that is not in the file"),
    "a metric that asks": (changed("metrics", name={"$ne": ""}), "metrics needs a right name"),
    "unequal lists": (changed("metrics", values=[]), "not equally many"),
    "text as values": (changed("metrics", values=["a"]), "metrics needs a right values"),
    "another content": (changed("fs.files", text="b"), "'a.py' has another md5"),
    "the same number twice": ([*GOOD, {"runs": RUN}], "two documents of runs have one _id"),
    "a choice of another run": (changed("sweep_choices", runs=[2]), "a run that is not in"),
    "a claim": (changed("sweep_cells", state="claimed"), "sweep_cells needs a right state"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    lines, message = BAD[name]
    with pytest.raises(UserError) as error:
        read_records(write(tmp_path / "f", lines))
    assert message in str(error.value) and "\n" not in str(error.value)


def _plain(path: Path) -> None:
    path.write_text("runs")


def _cut(path: Path) -> None:
    write(path, GOOD).write_bytes(path.read_bytes()[:-40])


def _flipped(path: Path) -> None:
    content = bytearray(write(path, GOOD).read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def _no_json(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(HEADER).encode() + b"\n{runs\n"))


def _brackets(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(HEADER).encode() + b"\n" + b"[" * 100_000 + b"\n"))


def _bomb(path: Path) -> None:
    """A line of 64 MiB in a few KiB."""
    path.write_bytes(gzip.compress(json.dumps(HEADER).encode() + b"\n" + b" " * 2**26))


FILES: dict[Callable[[Path], None], str] = {
    _plain: "damaged, or no gzip'ed file", _cut: "damaged", _flipped: "damaged",
    _no_json: "damaged", _brackets: "nested too deeply", _bomb: "unpacks to more than",
    lambda path: None: "No such file",
    lambda path: path.mkdir(): "Is a directory",
    lambda path: write(path, GOOD, {**HEADER, "version": 2}) and None: "is no file of",
}  # fmt: skip


@pytest.mark.parametrize("make", list(FILES), ids=lambda make: make.__name__)
def test_a_file_that_is_none_is_refused_before_a_database_is_opened(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    make(tmp_path / "f")
    good = write(tmp_path / "good", GOOD)
    assert main([str(good), str(tmp_path / "f")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and FILES[make] in error
    assert not (tmp_path / "data").exists()
