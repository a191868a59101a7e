"""A file of finished runs: gzip'ed JSON lines of MongoDB extended JSON, checked when read.

The first line is `HEADER`; every other one is {COLLECTION: document}. Nothing of the file reaches
a database before all of it has been checked: collections and fields are those of `FIELDS`, values
plain data, no key starts with ``$``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bson import Int64, ObjectId, json_util

from experiments.tracking.errors import UserError

Document = dict[str, Any]

HEADER = {"format": "l2l_implicit records", "version": 1}
LINE_LIMIT = 32 * 2**20
FILE_LIMIT = 2**30
"""Bytes of one line and of the whole, uncompressed: a small file may be made to unpack to more."""
DEPTH = 40

FIELDS: Mapping[str, frozenset[str]] = {
    "runs": frozenset({
        "_id", "experiment", "format", "command", "host", "start_time", "config", "meta", "status",
        "resources", "artifacts", "captured_out", "info", "heartbeat", "result", "stop_time",
        "fail_trace",
    }),
    "metrics": frozenset({"_id", "run_id", "name", "steps", "values", "timestamps"}),
    "fs.files": frozenset({
        "_id", "filename", "md5", "metadata", "contentType", "data",
    }),
    "sweep_cells": frozenset({
        "_id", "name", "state", "failures", "beat", "token", "host", "process",
    }),
    "sweep_choices": frozenset({
        "_id", "method", "index", "settings", "cells", "runs", "accuracies", "time",
    }),
}  # fmt: skip
"""What a line may hold; ``data`` is a file's content (in the file ``text``, where it is that)."""

ENDED = ("COMPLETED", "FAILED", "INTERRUPTED")
PLAIN = (bool, int, Int64, float, str, datetime, ObjectId, type(None))
"""Exactly these: JavaScript code is a kind of text in bson."""


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(is_one(item) for item in value)


def _is_artifact(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"name", "file_id"} and (
        isinstance(value["name"], str) and isinstance(value["file_id"], ObjectId)
    )  # fmt: skip


def _is_source(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [str, ObjectId]


def _is_experiment(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_right(value[name]) for name, is_right in EXPERIMENT.items() if name in value
    )


KINDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "runs": {
        "_id": _is_id, "start_time": _is(datetime), "status": lambda v: v in ENDED,
        "experiment": _is_experiment, "config": _is(dict), "meta": _is(dict), "info": _is(dict),
        "host": _is(dict), "artifacts": _list_of(_is_artifact),
    },
    "metrics": {
        "_id": _is(ObjectId), "run_id": _is_id, "name": _is(str), "steps": _list_of(_is(int)),
        "values": _list_of(_is(int, float)), "timestamps": _list_of(_is(datetime)),
    },
    "fs.files": {"_id": _is(ObjectId), "filename": _is(str), "data": _is(bytes)},
    "sweep_cells": {"_id": _is(str), "state": lambda v: v in ("free", "failed")},
    "sweep_choices": {
        "_id": _is(str), "index": _is(int), "cells": _list_of(_is(str)),
        "runs": _list_of(lambda v: v is None or _is_id(v)), "time": _is(datetime),
    },
}  # fmt: skip
"""What a document must hold; these values are used in questions to a database."""


OPTIONAL: Mapping[str, Callable[[Any], bool]] = {
    "stop_time": _is(datetime, type(None)), "heartbeat": _is(datetime, type(None)),
    "captured_out": _is(str, type(None)), "fail_trace": _list_of(_is(str)), "command": _is(str),
}  # fmt: skip
"""What a run may hold, and then like this."""

EXPERIMENT: Mapping[str, Callable[[Any], bool]] = {
    "name": _is(str), "sources": _list_of(_is_source), "repositories": _list_of(_is(dict)),
    "dependencies": _list_of(_is(str)), "base_dir": _is(str), "mainfile": _is(str, type(None)),
}  # fmt: skip

METRIC_LISTS = ("steps", "values", "timestamps")


@dataclass
class Records:
    """What a file holds, by collection."""

    documents: dict[str, list[Document]] = field(default_factory=dict)

    def __getitem__(self, collection: str) -> list[Document]:
        return self.documents.setdefault(collection, [])


def write_records(path: Path, records: Records) -> int:
    """Write the file; its size in bytes. The same records make the same file."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(json.dumps(HEADER).encode() + b"\n")
        for collection in FIELDS:
            for document in records[collection]:
                shown = _readable(document) if collection == "fs.files" else document
                file.write(json_util.dumps({collection: shown}).encode() + b"\n")
    return path.stat().st_size


def _readable(file: Document) -> Document:
    """A file of text with ``text`` instead of ``data``: it packs better."""
    try:
        return {**{k: v for k, v in file.items() if k != "data"}, "text": file["data"].decode()}
    except UnicodeDecodeError:
        return file


def read_records(path: Path) -> Records:
    """Read and check a file.

    Raises:
        UserError: it is no such file, or holds anything unexpected; one line.
    """
    records = Records()
    try:
        with gzip.open(path, "rb") as file:
            lines = _lines(iter(lambda: file.readline(LINE_LIMIT + 1), b""), path)
            if json.loads(next(lines, b"null")) != HEADER:
                raise UserError(f"{path} is no file of experiments.tracking.export, version 1")
            for number, line in enumerate(lines, 2):
                collection, document = _parse(line, f"{path}, line {number}")
                records[collection].append(document)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(f"{path} is damaged, or no gzip'ed file of JSON lines") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    _check_references(records, path)
    return records


def _lines(lines: Iterable[bytes], path: Path) -> Any:
    total = 0
    for line in lines:
        total += len(line)
        if len(line) > LINE_LIMIT or total > FILE_LIMIT:
            raise UserError(f"{path} unpacks to more than {FILE_LIMIT >> 20} MiB, or to a line of"
                            f" more than {LINE_LIMIT >> 20} MiB; export fewer runs")  # fmt: skip
        yield line


def _parse(line: bytes, where: str) -> tuple[str, Document]:
    try:
        entry = json_util.loads(line)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except Exception as error:  # whatever the extended JSON's decoders raise on nonsense
        raise UserError(f"{where}: no extended JSON: {' '.join(str(error).split())}") from None
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: expected one collection's document")
    ((collection, document),) = entry.items()
    if collection not in FIELDS or not isinstance(document, dict):
        raise UserError(f"{where}: expected one of {', '.join(FIELDS)}, got {collection[:60]!r}")
    if collection == "fs.files" and isinstance(document.get("text"), str):
        document["data"] = document.pop("text").encode(errors="replace")
    _check(collection, document, where)
    return collection, document


def _check(collection: str, document: Document, where: str) -> None:
    unknown = sorted(document.keys() - FIELDS[collection])
    if unknown:
        raise UserError(f"{where}: {collection} has no field {unknown[0][:60]!r}")
    for name, is_right in KINDS[collection].items():
        if name not in document or not is_right(document[name]):
            raise UserError(f"{where}: {collection} needs a right {name}")
    if collection == "runs":
        wrong = [n for n, is_right in OPTIONAL.items() if n in document
                 and not is_right(document[n])]  # fmt: skip
        if wrong:
            raise UserError(f"{where}: a run needs a right {wrong[0]}")
    values = {k: v for k, v in document.items() if (collection, k) != ("fs.files", "data")}
    _check_plain(values, where, DEPTH)
    if collection == "metrics" and len({len(document[k]) for k in METRIC_LISTS}) > 1:
        raise UserError(f"{where}: steps, values and timestamps are not equally many")
    if collection == "fs.files" and document.get("md5", "") not in ("", _md5(document["data"])):
        raise UserError(f"{where}: the content of {document['filename'][:60]!r} has another md5")


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def _check_plain(value: Any, where: str, depth: int) -> None:
    """Numbers, text, times and file numbers, in lists and in objects without operators."""
    if depth == 0:
        raise UserError(f"{where}: nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if key.startswith("$") or "\0" in key:
                raise UserError(f"{where}: the key {key[:60]!r} is not one of a record")
            _check_plain(item, where, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth - 1)
    elif type(value) not in PLAIN:
        raise UserError(f"{where}: a value of the type {type(value).__name__} is no record's")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: a number beyond 64 bits")


def _check_references(records: Records, path: Path) -> None:
    """Every metric and source belongs to something of the same file; no number is used twice."""
    for collection in FIELDS:
        ids = [document["_id"] for document in records[collection]]
        if len(set(ids)) < len(ids):
            raise UserError(f"{path}: two documents of {collection} have one _id")
    runs = {run["_id"] for run in records["runs"]}
    files = {file["_id"] for file in records["fs.files"]}
    if any(metric["run_id"] not in runs for metric in records["metrics"]):
        raise UserError(f"{path}: a metric belongs to a run that is not in the file")
    for run in records["runs"]:
        if any(number not in files for number in files_of(run)):
            raise UserError(f"{path}: a file of run {run['_id']} is not in the file")
    for choice in records["sweep_choices"]:
        if any(run is not None and run not in runs for run in choice["runs"]):
            raise UserError(f"{path}: a choice was made from a run that is not in the file")


def files_of(run: Mapping[str, Any]) -> list[ObjectId]:
    """The numbers of a run's sources and artifacts in ``fs.files``."""
    sources = [number for _, number in run["experiment"].get("sources", ())]
    return [*sources, *(artifact["file_id"] for artifact in run["artifacts"])]


def identity(run: Mapping[str, Any]) -> str:
    """What makes two documents one run, in whichever database: its journal's name.

    A run without a journal (of plain Sacred) is known by its start, host and configuration.
    """
    journal = (run.get("meta") or {}).get("journal")
    if isinstance(journal, str) and journal:
        return journal
    parts = [run["start_time"], (run.get("host") or {}).get("hostname"), run.get("config")]
    text = json_util.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
