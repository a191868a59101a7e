"""From a run's journal into the database, in Sacred's own layout.

While a run goes on, what is new in its journal is appended in the database. After a failure it is
not known what the server has done: then all of it is written again, each document as a whole. What
the server has acknowledged is read back before a journal is removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import gridfs
from gridfs.errors import GridFSError
from pymongo import WriteConcern
from pymongo.collection import Collection

from experiments.tracking.database import Database, Documents
from experiments.tracking.embedded import data_folder
from experiments.tracking.errors import TrackingError, one_line
from experiments.tracking.journal import Entry, JournalReader
from experiments.tracking.values import is_name, told

# A document ends at 16 MB, about 388,000 points, and is rewritten whole at every push.
POINTS_PER_DOCUMENT = 100_000
KILLED = "killed: the process ended without a word (kill -9, out of memory, power)"
COMMAND = "experiments.tracking.upload"
COLUMNS = ("steps", "values", "timestamps")


def next_run_id(runs: Collection[dict[str, Any]]) -> int:
    """One more than the largest number in use; runs may have names instead (Sacred's -i)."""
    last = runs.find_one({"_id": {"$gte": 0, "$lt": 2**62}}, {"_id": 1}, sort=[("_id", -1)])
    return int(last["_id"]) + 1 if last else 1


def index_metrics(documents: Documents) -> None:
    """Without this index every look-up of a run's metrics reads the metrics of all runs."""
    documents["metrics"].create_index([("run_id", 1), ("name", 1)])


class Series:
    """One metric: points that are not in the database yet, and the digest of all there are."""

    def __init__(self) -> None:
        self.new: list[tuple[Any, ...]] = []
        self.count, self.digest = 0, hashlib.sha256()

    def add(self, *point: Any) -> None:
        """One more point: step, value, time."""
        self.new.append(point)
        self.count += 1
        self.digest.update(_text(*point))


def _text(step: Any, value: Any, time: Any) -> bytes:
    """A point as it is, whether it comes from the journal or from the database."""
    naive = time.replace(tzinfo=None) if isinstance(time, datetime) else time
    return f"{step!r} {value!r} {naive}\n".encode()


class Uploader:
    """Bring the database to the state that a journal describes.

    `run_id` is the run's number in the database: the journal's own, or a new one where another run
    has taken it meanwhile. `document` is the run's as far as read.
    """

    def __init__(self, reader: JournalReader, documents: Documents) -> None:
        self.reader, self._documents = reader, documents
        self._runs = documents.get_collection("runs", write_concern=WriteConcern(w=1, j=True))
        self._metrics, self._files = documents["metrics"], gridfs.GridFS(documents)
        self.run_id: Any = None
        self._again, self._known = True, False
        self._forget()

    def how_it_ended(self) -> str:
        """Nothing, or that the run's end is missing because it was killed."""
        killed = self.document.get("fail_trace") == [KILLED]
        return f"; its end is missing: {KILLED}" if killed else ""

    def _forget(self) -> None:
        self.document: Entry = {}
        self._series: dict[str, Series] = {}
        self._counts: Counter[str] = Counter()
        self._artifacts: dict[Any, Entry] = {}
        self._stored: dict[Any, bytes] = {}  # the digest of each artifact, by file
        self.reader.rewind()

    def upload(self, abandoned: bool = False) -> None:
        """Write what is new in the journal; the run's own document last, and to the disk.

        A run that has not ended although its process has, ``abandoned``, is marked as killed.
        After PyMongoError, the database failed, call it again later.
        """
        self._documents.command("ping")  # read nothing into memory while nobody answers
        if self._again:
            self._forget()
        again, self._again = self._again, True  # until everything is written
        self._read()
        if "meta" not in self.document:  # it is not begun, or its beginning is damaged
            return
        status, marked = self._claim_id()
        ended, fault = self.document["status"] != "RUNNING", ""
        cut = self.reader.damage or abandoned and not ended and not marked
        self._known = bool(cut and status != "RUNNING")
        if self._known:
            self.document["status"] = status
            return  # the database has it from before the damage, or the copy
        if self.reader.damage and (ended or abandoned):
            fault = f"a part of the record is lost: {self.reader.damage}"
        elif not ended and abandoned:
            fault = KILLED
        if fault:
            sign = self.document.get("heartbeat") or self.document.get("start_time")
            self.document["fail_trace"] = [fault]
            self.document["stop_time"] = sign or datetime.now(UTC)
            # the database may say already how it has ended
            self.document["status"] = "FAILED" if status == "RUNNING" else status
        for file_id in list(self._artifacts):
            self._put(file_id, self._artifacts.pop(file_id))
        for name, series in self._series.items():
            if series.new:
                self._write(name, series, again)
        self._runs.update_one({"_id": self.run_id}, {"$set": self._whole()}, upsert=True)
        self._again = False

    def _read(self) -> None:
        for entry in self.reader.entries():
            if "metric" in entry:
                name = entry["metric"]
                if (part := self._counts[name] // POINTS_PER_DOCUMENT) > 0:
                    name = f"{name} ({part + 1})"
                self._counts[entry["metric"]] += 1
                point = entry["step"], entry["value"], entry["time"]
                self._series.setdefault(name, Series()).add(*point)
            elif "artifact" in entry:
                self._artifacts[entry["id"]] = entry
            elif "output" in entry:
                keep, text = entry["output"]
                before = self.document.get("captured_out", "")
                self.document["captured_out"] = before[:keep] + text
            else:
                self.document.update(entry.get("start") or entry.get("set") or {})

    def _claim_id(self) -> tuple[str, bool]:
        """Take the journal's run number unless another run has it.

        The run's stored status, and whether it is our mark of a run that was killed.
        """
        own = {"meta.journal": {"$eq": self.document["meta"]["journal"]}}
        fields = {"status": 1, "fail_trace": 1}
        wanted = self.document["_id"] if self.run_id is None else self.run_id
        stored = self._runs.find_one({"_id": {"$eq": wanted}, **own}, fields)
        fits = type(wanted) in (int, str) and is_name(str(wanted))
        if not stored and (not fits or self._runs.find_one({"_id": wanted}, {"_id": 1})):
            stored = self._runs.find_one(own, fields)
            wanted = stored["_id"] if stored else next_run_id(self._runs)
        self.run_id = wanted
        stored = stored or {}
        return str(stored.get("status", "RUNNING")), stored.get("fail_trace") == [KILLED]

    def _put(self, file_id: Any, artifact: Entry) -> None:
        name, self._stored[file_id] = artifact["artifact"], _digest(artifact["data"])
        if self._content(file_id) != self._stored[file_id]:
            self._files.delete(file_id)  # what an interrupted attempt has left
            self._files.put(
                artifact["data"], _id=file_id, filename=f"artifact://runs/{self.run_id}/{name}",
                metadata=artifact["metadata"], contentType=artifact["content_type"],
            )  # fmt: skip
        self.document["artifacts"].append({"name": name, "file_id": file_id})

    def _content(self, file_id: Any) -> bytes:
        """The digest of what is stored; of nothing where that is missing or damaged."""
        try:
            return _digest(self._files.get(file_id).read())
        except GridFSError:
            return b""

    def _write(self, name: str, series: Series, again: bool) -> None:
        """Append the points, or write all of them; never fewer than there are."""
        columns = dict(zip(COLUMNS, map(list, zip(*series.new, strict=True)), strict=True))
        push = {"$push": {column: {"$each": values} for column, values in columns.items()}}
        if not (again and self._has_been_cut() and len(self._rows(name)) >= series.count):
            key = {"run_id": self.run_id, "name": name}
            self._metrics.update_one(key, {"$set": columns} if again else push, upsert=True)
        series.new = []

    def _has_been_cut(self) -> bool:
        """Whether the journal may hold less than it once did: damaged, or without an end."""
        return bool(self.reader.damage or self.how_it_ended())

    def _rows(self, name: str) -> list[Any]:
        """The points that are stored."""
        stored = self._metrics.find_one({"run_id": self.run_id, "name": name}) or {}
        return list(zip(*(stored.get(column, ()) for column in COLUMNS), strict=True))

    def _whole(self) -> Entry:
        """The run's document as it should be, with the metrics' own."""
        found = self._metrics.find({"run_id": self.run_id}, {"name": 1}).sort("_id", 1)
        named = [{"name": m["name"], "id": str(m["_id"])} for m in found]
        known = [metric for metric in named if metric["name"] in self._series]
        info = {**self.document["info"], **({"metrics": known} if known else {})}
        return {**self.document, "_id": self.run_id, "info": info}

    def verify(self) -> None:
        """Read back what is stored, whatever an answer said; TrackingError if it is not right.

        The next `upload` then writes it again.
        """
        if self.run_id is None or self._known or self.reader.damage:
            return
        self._again = True
        found = self._runs.find_one({"_id": self.run_id}) or {}
        wrong = [f"{key!r} of the run" for key, value in self._whole().items()
                 if bson.encode({"": value}) != bson.encode({"": found.get(key)})]  # fmt: skip
        for name, series in self._series.items():
            rows = self._rows(name)
            known = rows[: series.count] if self._has_been_cut() else rows
            if _digest(b"".join(_text(*row) for row in known)) != series.digest.digest():
                wrong.append(f"points of {name!r}")
        wrong += [f"artifact {f}" for f, d in self._stored.items() if self._content(f) != d]
        if wrong:
            raise TrackingError(f"the database has lost {wrong[0]}")
        self._again = False


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def upload_journal(path: Path, documents: Documents) -> Uploader | None:
    """Upload the journal of a process that has ended, read it back, and remove the file.

    None is returned if its process still runs. The file is kept after TrackingError, it is damaged
    or no journal, and PyMongoError, the database failed.
    """
    with closing(JournalReader(path)) as reader:
        if not reader.is_abandoned():
            return None
        uploader = Uploader(reader, documents)
        try:
            uploader.upload(abandoned=True)
            uploader.verify()
        except TrackingError:  # the database had less than it had said: once more
            uploader.upload(abandoned=True)
            uploader.verify()
        if uploader.run_id is None and reader.header:  # killed at its start, or that is lost
            own = {"meta.journal": {"$eq": reader.header["token"]}, "status": "RUNNING"}
            ended = {"status": "FAILED", "fail_trace": [reader.damage or KILLED]}
            documents["runs"].update_one(own, {"$set": ended})
        if uploader.run_id is None and (reader.damage or reader.count > 1):
            what = "is not the journal of a run, or its beginning is damaged"
            raise TrackingError(f"{path} {what}; it is kept")
        if not reader.damage:
            path.unlink(missing_ok=True)
            return uploader
        # by its new name it can be uploaded again, and no run looks at it
        kept = path
        while kept.suffix != ".damaged" or (kept != path and os.path.lexists(kept)):
            kept = kept.with_name(f"{kept.name}.damaged")
        path.rename(kept)
        raise TrackingError(
            f"a part of run {uploader.run_id} is lost: of its journal {reader.damage}; the rest is"
            f" in the database, as {uploader.document['status']}; the journal is kept: {kept}"
        )


def upload_abandoned(database: Database, log: logging.Logger) -> None:
    """Upload what earlier runs of this host could not, and mark those that were killed."""
    for path in sorted(data_folder("journals").glob("run-*.jsonl")):
        try:
            with closing(JournalReader(path)) as reader:
                owner = reader.header.get("database"), reader.header.get("host")
                if not reader.header and reader.is_abandoned():
                    raise TrackingError(f"its beginning is damaged; python -m {COMMAND} reads on")
            if owner == (database.label, platform.node()):
                uploader = upload_journal(path, database.documents)
                if uploader and uploader.document:  # else it goes on, or has never begun
                    text = "Uploaded the record that run %s left%s"
                    log.warning(text, told(str(uploader.run_id)), uploader.how_it_ended())
        except FileNotFoundError:
            continue  # another run has just uploaded it
        except Exception as error:  # whatever a database answers; the file is kept
            log.warning("Cannot upload %s: %s", told(path.name), database.redacted(one_line(error)))
