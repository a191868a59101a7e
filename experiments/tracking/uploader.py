"""From a run's journal into the database, in Sacred's own layout.

Every step may be repeated: after a failure it is not known what the server has done. Points are
pushed only onto a series of exactly the expected length; documents are set, never changed.
"""

from __future__ import annotations

import logging
import platform
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gridfs
from pymongo import ASCENDING, DESCENDING, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from experiments.tracking.database import Database, Documents
from experiments.tracking.errors import TrackingError
from experiments.tracking.journal import Entry, JournalReader

POINTS_PER_DOCUMENT = 100_000
"""A document ends at 16 MB, about 388,000 points, and is rewritten whole at every push."""

KILLED = "killed: the process ended without a word (kill -9, out of memory, power)"


def next_run_id(runs: Collection[dict[str, Any]]) -> int:
    """One more than the largest number in use; runs may have names instead (Sacred's -i)."""
    last = runs.find_one({"_id": {"$gte": 0}}, {"_id": 1}, sort=[("_id", DESCENDING)])
    return int(last["_id"]) + 1 if last else 1


def index_metrics(documents: Documents) -> None:
    """Without this index every look-up of a run's metrics reads the metrics of all runs."""
    documents["metrics"].create_index([("run_id", ASCENDING), ("name", ASCENDING)])


@dataclass
class Series:
    """One metric's points: `sent` are known to be in the database, `points` are not yet."""

    name: str
    id: Any = None
    sent: int = 0
    points: list[Entry] = field(default_factory=list)


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
        self._forget()

    def _forget(self) -> None:
        self.document: Entry = {}
        self._changed: set[str] = set()
        self._counts: dict[str, int] = {}
        self._series: dict[str, Series] = {}
        self._artifacts: list[Entry] = []
        self._reader.rewind()

    def upload(self) -> None:
        """Write everything the journal holds; the run's own document last, and to the disk.

        Raises:
            PyMongoError: the database failed; call again later.
        """
        self.documents.command("ping")  # read nothing into memory while nobody answers
        self._read()
        if not self.document:
            return
        self._claim_id()
        while self._artifacts:
            self._put(self._artifacts[0])
            del self._artifacts[0]
        for series in self._series.values():
            if series.points:
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
                self._set({"captured_out": self.document["captured_out"][:keep] + text})
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
        self._series.setdefault(name, Series(name)).points.append(entry)

    def _claim_id(self) -> None:
        """Take the journal's run number unless another run has it in this database."""
        if self.run_id is not None:
            return
        wanted, token = self.document["_id"], self.document["meta"]["journal"]
        runs = self.documents["runs"]
        there = runs.find_one({"_id": wanted}, {"meta.journal": 1})
        if there is None or there.get("meta", {}).get("journal") == token:
            self.run_id = wanted
        else:
            moved = runs.find_one({"meta.journal": token}, {"_id": 1})
            self.run_id = moved["_id"] if moved else next_run_id(runs)

    def _put(self, artifact: Entry) -> None:
        files = gridfs.GridFS(self.documents)
        file_id, name = artifact["id"], artifact["artifact"]
        if not files.exists(file_id):
            files.delete(file_id)  # what an interrupted attempt has left
            files.put(
                artifact["data"],
                _id=file_id,
                filename=f"artifact://runs/{self.run_id}/{name}",
                metadata=artifact["metadata"],
                contentType=artifact["content_type"],
            )
        listed = [item for item in self.document["artifacts"] if item["file_id"] != file_id]
        self._set({"artifacts": [*listed, {"name": name, "file_id": file_id}]})

    def _push(self, series: Series) -> None:
        """Append the points; where the length is not the expected one, find out and go on."""
        metrics = self.documents["metrics"]
        if series.id is None:
            series.id = self._create(series.name)
        while series.points:
            expected = {"_id": series.id, "steps": {"$size": series.sent}}
            columns = {"steps": "step", "values": "value", "timestamps": "time"}
            push = {to: {"$each": [p[key] for p in series.points]} for to, key in columns.items()}
            done = len(series.points)
            if not metrics.update_one(expected, {"$push": push}).matched_count:
                done = self._present(series) - series.sent
                if done < 0:
                    self._forget()
                    raise TrackingError(f"the database lost points of {series.name!r}")
            series.sent += min(done, len(series.points))
            del series.points[:done]

    def _create(self, name: str) -> Any:
        metrics, key = self.documents["metrics"], {"run_id": self.run_id, "name": name}
        empty: Entry = {"steps": [], "values": [], "timestamps": []}
        metrics.update_one(key, {"$setOnInsert": empty}, upsert=True)
        found = metrics.find_one(key, {"_id": 1})
        if found is None:
            raise TrackingError(f"the database lost the metric {name!r}")
        return found["_id"]

    def _present(self, series: Series) -> int:
        stored = self.documents["metrics"].find_one({"_id": series.id}, {"steps": 1})
        return len(stored["steps"]) if stored else -1

    def _save(self) -> None:
        """j=True makes this write, and with it all earlier ones, survive a crash."""
        runs = self.documents.get_collection("runs", write_concern=WriteConcern(w=1, j=True))
        named = [{"name": s.name, "id": str(s.id)} for s in self._series.values()]
        info = {**self.document["info"], "metrics": named} if named else self.document["info"]
        whole = {**self.document, "_id": self.run_id, "info": info}
        fields = {key: whole[key] for key in self._changed | {"info"}}
        if not runs.update_one({"_id": self.run_id}, {"$set": fields}).matched_count:
            runs.replace_one({"_id": self.run_id}, whole, upsert=True)
        self._changed.clear()

    def close(self) -> None:
        """Close the journal."""
        self._reader.close()

    def mark_killed(self) -> None:
        """Record the run as FAILED, the status that every viewer of Sacred's runs knows."""
        self._set({"status": "FAILED", "fail_trace": [KILLED], "stop_time": self._last_sign()})
        self._save()

    def _last_sign(self) -> datetime:
        sign = self.document.get("heartbeat") or self.document.get("start_time")
        return sign or datetime.now(timezone.utc)


def upload_journal(path: Path, documents: Documents) -> Uploader | None:
    """Upload the journal of a process that has ended, and remove the file.

    Returns:
        The uploader; None if there is nothing to do because its process still runs.

    Raises:
        ValueError: the file is no journal.
        PyMongoError: the database failed; the file is kept.
    """
    with closing(JournalReader(path)) as reader:
        if not reader.is_abandoned():
            return None
        uploader = Uploader(reader, documents)
        uploader.upload()
        if uploader.document.get("status") == "RUNNING":
            uploader.mark_killed()
        elif not uploader.document:  # killed while the run's document was being inserted
            own = {"meta.journal": reader.header["token"]}
            killed = {"status": "FAILED", "fail_trace": [KILLED]}
            documents["runs"].update_one(own, {"$set": killed})
        path.unlink(missing_ok=True)
        return uploader


def upload_abandoned(database: Database, folder: Path, log: logging.Logger) -> None:
    """Upload what earlier runs of this host could not, and mark those that were killed."""
    for path in sorted(folder.glob("run-*.jsonl")):
        try:
            with closing(JournalReader(path)) as reader:
                owner = reader.header["database"], reader.header["host"]
            if owner == (database.label, platform.node()):
                uploader = upload_journal(path, database.documents)
                if uploader is not None:
                    log.warning("Uploaded the record that run %s left", uploader.run_id)
        except FileNotFoundError:
            continue  # another run has just uploaded it
        except (PyMongoError, TrackingError, ValueError, OSError) as error:
            log.warning("Cannot upload %s: %s", path, database.redactor.text(str(error)))
