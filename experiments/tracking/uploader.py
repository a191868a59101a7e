"""From a run's journal into the database, in Sacred's own layout.

Every step may be repeated: after a failure it is not known what the server has done. Points are
pushed only onto a series of exactly the expected length; documents are set, never changed. What
the server has acknowledged is read back before a journal is removed.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bson
import gridfs
from pymongo import ASCENDING, DESCENDING, WriteConcern
from pymongo.collection import Collection

from experiments.tracking.database import Database, Documents
from experiments.tracking.errors import TrackingError
from experiments.tracking.journal import Entry, JournalReader

POINTS_PER_DOCUMENT = 100_000
"""A document ends at 16 MB, about 388,000 points, and is rewritten whole at every push."""

KILLED = "killed: the process ended without a word (kill -9, out of memory, power)"
COMMAND = "experiments.tracking.upload"
COLUMNS = {"steps": "step", "values": "value", "timestamps": "time"}


def next_run_id(runs: Collection[dict[str, Any]]) -> int:
    """One more than the largest number in use; runs may have names instead (Sacred's -i)."""
    last = runs.find_one({"_id": {"$gte": 0}}, {"_id": 1}, sort=[("_id", DESCENDING)])
    return int(last["_id"]) + 1 if last else 1


def index_metrics(documents: Documents) -> None:
    """Without this index every look-up of a run's metrics reads the metrics of all runs."""
    documents["metrics"].create_index([("run_id", ASCENDING), ("name", ASCENDING)])


@dataclass
class Series:
    """One metric's points: `sent` are in the database for all we know, `points` are not yet."""

    name: str
    id: Any = None
    sent: int = 0
    points: list[Entry] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, point: Entry) -> None:
        """One more point, which is not in the database yet."""
        self.points.append(point)
        self.digest.update(_text(point["step"], point["value"], point["time"]))


def _text(step: Any, value: Any, time: datetime | None) -> bytes:
    """A point as it is, whether it comes from the journal or from the database."""
    return f"{step!r} {value!r} {time and time.replace(tzinfo=None)}\n".encode()


class Uploader:
    """Bring the database to the state that a journal describes.

    Args:
        reader: the journal, at its first entry.
        documents: the database.

    Attributes:
        run_id: the run's number in the database: the journal's own, or a new one where
            another run has taken it meanwhile.
        document: the run's document as far as read.
    """

    def __init__(self, reader: JournalReader, documents: Documents) -> None:
        self.documents = documents
        self.run_id: Any = None
        self._reader = reader
        self._files = gridfs.GridFS(documents)
        self._forget()

    @property
    def damage(self) -> str:
        """What is wrong with the journal, in words; empty if nothing is."""
        return self._reader.damage

    def _forget(self) -> None:
        self.document: Entry = {}
        self._changed: set[str] = set()
        self._counts: dict[str, int] = {}
        self._series: dict[str, Series] = {}
        self._artifacts: list[Entry] = []
        self._stored: dict[Any, str] = {}  # the content's digest, by file id
        self._reader.rewind()

    def upload(self, abandoned: bool = False) -> None:
        """Write everything the journal holds; the run's own document last, and to the disk.

        Args:
            abandoned: the run's process has ended; a run that has not is marked as killed.

        Raises:
            PyMongoError: the database failed; call again later.
        """
        self.documents.command("ping")  # read nothing into memory while nobody answers
        self._read()
        if not self.document:
            return
        status = self._claim_id().get("status", "RUNNING")
        if self._reader.damage and status != "RUNNING":
            self.document["status"] = status
            return  # the database has it from before the damage
        if abandoned and self.document["status"] == "RUNNING":
            self._mark(KILLED, status)
        if self._reader.damage and self.document["status"] != "RUNNING":
            self._mark(f"a part of the record is lost: {self._reader.damage}", status)
        while self._artifacts:
            self._put(self._artifacts[0])
            del self._artifacts[0]
        for series in self._series.values():
            self._push(series)
        self._save()

    def _read(self) -> None:
        for entry in self._reader.entries():
            if "metric" in entry:
                self._add_point(entry)
            elif "artifact" in entry:
                self._artifacts.append(entry)
            elif "output" in entry:
                keep, text = entry["output"]
                self._set({"captured_out": self.document.get("captured_out", "")[:keep] + text})
            else:
                self._set(entry.get("start") or entry.get("set") or {})

    def _set(self, fields: Entry) -> None:
        self.document.update(fields)
        self._changed |= fields.keys() - {"_id"}

    def _add_point(self, entry: Entry) -> None:
        name = entry["metric"]
        count = self._counts[name] = self._counts.get(name, 0) + 1
        if count > POINTS_PER_DOCUMENT:
            name = f"{name} ({1 + (count - 1) // POINTS_PER_DOCUMENT})"
        self._series.setdefault(name, Series(name)).add(entry)

    def _claim_id(self) -> Entry:
        """Take the journal's run number unless another run has it; what is stored of the run."""
        token, runs = self.document["meta"]["journal"], self.documents["runs"]
        wanted = self.document["_id"] if self.run_id is None else self.run_id
        stored = runs.find_one({"_id": wanted}, {"meta.journal": 1, "status": 1})
        if stored and stored.get("meta", {}).get("journal") != token:
            stored = runs.find_one({"meta.journal": token}, {"status": 1})
            wanted = stored["_id"] if stored else next_run_id(runs)
        self.run_id = wanted
        return stored or {}

    def _mark(self, reason: str, status: str) -> None:
        """Record the run as FAILED, unless the database says already how it has ended."""
        sign = self.document.get("heartbeat") or self.document.get("start_time")
        self._set({"fail_trace": [reason], "stop_time": sign or datetime.now(timezone.utc)})
        self._set({"status": "FAILED" if status == "RUNNING" else status})

    def _put(self, artifact: Entry) -> None:
        file_id, name = artifact["id"], artifact["artifact"]
        if not self._files.exists(file_id):
            self._files.delete(file_id)  # what an interrupted attempt has left
            self._files.put(
                artifact["data"],
                _id=file_id,
                filename=f"artifact://runs/{self.run_id}/{name}",
                metadata=artifact["metadata"],
                contentType=artifact["content_type"],
            )
        self._stored[file_id] = hashlib.sha256(artifact["data"]).hexdigest()
        listed = [item for item in self.document["artifacts"] if item["file_id"] != file_id]
        self._set({"artifacts": [*listed, {"name": name, "file_id": file_id}]})

    def _push(self, series: Series) -> None:
        """Append the points; where the length is not the expected one, find out and go on."""
        metrics = self.documents["metrics"]
        if series.id is None:
            key = {"run_id": self.run_id, "name": series.name}
            empty: Entry = {column: [] for column in COLUMNS}
            metrics.update_one(key, {"$setOnInsert": empty}, upsert=True)
            found = metrics.find_one(key, {"_id": 1})
            series.id = None if found is None else found["_id"]
        while series.points:
            expected = {"_id": series.id, "steps": {"$size": series.sent}}
            push = {to: {"$each": [p[key] for p in series.points]} for to, key in COLUMNS.items()}
            done = len(series.points)
            if not metrics.update_one(expected, {"$push": push}).matched_count:
                stored = metrics.find_one({"_id": series.id}, {"steps": 1}) or {"steps": []}
                done = len(stored["steps"]) - series.sent
                if done < 0 or series.id is None:
                    self._lost(f"points of {series.name!r}")
            series.sent += min(done, len(series.points))
            del series.points[:done]

    def _save(self) -> None:
        """j=True makes this write, and with it all earlier ones, survive a crash."""
        runs = self.documents.get_collection("runs", write_concern=WriteConcern(w=1, j=True))
        whole = self._whole()
        fields = {key: whole[key] for key in self._changed | {"info"}}
        if not runs.update_one({"_id": self.run_id}, {"$set": fields}).matched_count:
            runs.replace_one({"_id": self.run_id}, whole, upsert=True)
        self._changed.clear()

    def _whole(self) -> Entry:
        """The run's document as it should be."""
        named = [{"name": s.name, "id": str(s.id)} for s in self._series.values()]
        info = {**self.document["info"], **({"metrics": named} if named else {})}
        return {**self.document, "_id": self.run_id, "info": info}

    def verify(self) -> None:
        """Read back what has been uploaded: whatever an answer says, this is what is stored.

        Raises:
            TrackingError: something is not there as it should be; the next `upload` writes it.
        """
        if not self.document or self._reader.damage:
            return
        found = self.documents["runs"].find_one({"_id": self.run_id}) or {}
        for key, value in self._whole().items():
            if bson.encode({"": value}) != bson.encode({"": found.get(key)}):
                self._lost(f"{key!r} of the run")
        for series in self._series.values():
            stored = self.documents["metrics"].find_one({"_id": series.id}) or {}
            rows = list(zip(*(stored.get(column, ()) for column in COLUMNS), strict=True))
            if not self._is_whole(series, rows):
                self.documents["metrics"].delete_one({"_id": series.id})
                self._lost(f"points of {series.name!r}")
        for file_id, digest in self._stored.items():
            content = self._files.get(file_id).read() if self._files.exists(file_id) else b""
            if hashlib.sha256(content).hexdigest() != digest:
                self._files.delete(file_id)
                self._lost("an artifact")

    def _is_whole(self, series: Series, rows: list[Any]) -> bool:
        """More points than in its journal may only have a run that was killed."""
        killed = self.document.get("fail_trace") == [KILLED]
        known = rows[: series.sent] if killed else rows
        return hashlib.sha256(b"".join(_text(*row) for row in known)).digest() == (
            series.digest.digest()
        )

    def _lost(self, what: str) -> None:
        self._forget()
        raise TrackingError(f"the database has lost {what}")

    def close(self) -> None:
        """Close the journal."""
        self._reader.close()


def upload_journal(path: Path, documents: Documents) -> Uploader | None:
    """Upload the journal of a process that has ended, read it back, and remove the file.

    Returns:
        The uploader; None if there is nothing to do because its process still runs.

    Raises:
        TrackingError: the file is damaged, or no journal: it is kept.
        PyMongoError: the database failed; the file is kept.
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
        if reader.damage:
            raise TrackingError(_damaged(path, reader, uploader))
        if not uploader.document:  # killed while the run's document was being inserted
            own = {"meta.journal": reader.header["token"]}
            killed = {"status": "FAILED", "fail_trace": [KILLED]}
            documents["runs"].update_one(own, {"$set": killed})
        path.unlink(missing_ok=True)
        return uploader


def _damaged(path: Path, reader: JournalReader, uploader: Uploader) -> str:
    if not uploader.document:
        return f"{path} is not the journal of a run, or is damaged: {reader.damage}; it is kept"
    kept = path if path.suffix == ".damaged" else path.with_name(path.name + ".damaged")
    path.rename(kept)  # told once; by its new name it can be uploaded again
    status = uploader.document["status"]
    return (
        f"a part of run {uploader.run_id} is lost: of its journal {reader.damage}; the rest is in"
        f" the database, as {status}; the journal is kept: {kept}"
    )


def upload_abandoned(database: Database, folder: Path, log: logging.Logger) -> None:
    """Upload what earlier runs of this host could not, and mark those that were killed."""
    for path in sorted(folder.glob("run-*.jsonl")):
        try:
            with closing(JournalReader(path)) as reader:
                owner = reader.header.get("database"), reader.header.get("host")
                if not reader.header:
                    raise TrackingError(f"{reader.damage}; python -m {COMMAND} takes the rest")
            if owner == (database.label, platform.node()):
                uploader = upload_journal(path, database.documents)
                if uploader is not None:
                    log.warning("Uploaded the record that run %s left", uploader.run_id)
        except FileNotFoundError:
            continue  # another run has just uploaded it
        except Exception as error:  # whatever a database answers; the file is kept
            log.warning("Cannot upload %s: %s", path, database.redactor.text(str(error)))
