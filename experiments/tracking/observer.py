"""Between Sacred's run and the database: a journal first, an upload in the background.

Sacred drops an observer for good at its first error and still ends the run as COMPLETED. Here
the database may go away and come back: the run only ever writes to its journal.
"""

from __future__ import annotations

import logging
import math
import mimetypes
import os
import platform
import shlex
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import bson
import pymongo
import pymongo.errors
from bson import Binary, ObjectId
from sacred.dependencies import get_digest
from sacred.observers import MongoObserver

from experiments.tracking import signals, uploader
from experiments.tracking.database import Database, seconds
from experiments.tracking.embedded import data_folder
from experiments.tracking.errors import TrackingError, UserError, one_line
from experiments.tracking.journal import Journal, JournalReader
from experiments.tracking.values import storable

DEFAULT_INTERVAL = 10.0
PATIENCE_VARIABLE = "L2L_IMPLICIT_MONGO_PATIENCE"
PATIENCE = 30.0  # seconds at a run's end that a database which is away may take to come back
LARGEST_RECORD = 12 * 2**20  # bytes of a run's document, of MongoDB's 16, beside its beginning
# Seconds the whole of the end may take after one Ctrl-C, and after two.
INTERRUPTED, HURRIED = 1.5, 0.5


class JournalObserver(MongoObserver):
    """Record one run in a journal, and from there every ``interval`` seconds in MongoDB.

    `token` is the journal's name, unique to the run and recorded as ``meta.journal``; `label` is
    the database's address without passwords, or `embedded`.
    """

    def __init__(self, database: Database, log: logging.Logger, interval: float) -> None:
        super().__init__(client=database.client, db_name=database.documents.name)
        self.token, self.label = uuid.uuid4().hex, database.label
        self._database, self._log = database, log
        self._interval = interval or DEFAULT_INTERVAL
        self._patience = seconds(PATIENCE_VARIABLE, PATIENCE)
        self._known: dict[str, Any] = {}
        self._uploader: uploader.Uploader | None = None
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._stop, self._deadline, self._error = threading.Event(), 0.0, ""
        self._stored, self._lost = False, ""  # whether all has been read back; what is not written
        uploader.upload_abandoned(database, log)
        header = {"token": self.token, "database": self.label, "host": platform.node()}
        self._journal = Journal(data_folder("journals") / f"run-{self.token}.jsonl", header)

    def started_event(self, **event: Any) -> Any:
        """Insert the run's document, which gives its number; later events go to the journal."""
        event = self._clean(event)
        event["meta_info"]["journal"] = self.token
        if isinstance(event["_id"], str) and event["_id"].isdecimal():  # Sacred's -i 7
            event["_id"] = int(event["_id"])
        try:
            uploader.index_metrics(self._database.documents)
            run_id = super().started_event(**event)
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._database.explain(error)) from None
        self._journal.append({"start": self.run_entry})
        reader = JournalReader(self._journal.path)
        self._uploader = uploader.Uploader(reader, self._database.documents)
        self._thread.start()
        return run_id

    def queued_event(self, **event: Any) -> Any:
        return super().queued_event(**self._clean(event))

    def _clean(self, value: Any) -> Any:
        return self._database.redacted(storable(value))

    def insert(self) -> None:
        """Insert the run's document under the next free number."""
        numbered = self.run_entry.get("_id") is None
        while True:
            if numbered:
                self.run_entry["_id"] = uploader.next_run_id(self.runs)
            try:
                self.runs.insert_one(self.run_entry)
                return
            except pymongo.errors.DuplicateKeyError:
                if not numbered:
                    raise UserError(f"run {self.run_entry['_id']!r} exists already") from None

    def save_sources(self, ex_info: Any) -> list[list[Any]]:
        """Store each source file once; Sacred's own look-up by md5 finds none in pymongo 4."""
        stored = []
        for name, md5 in ex_info["sources"]:
            key = {"filename": os.path.join(ex_info["base_dir"], name), "md5": md5}
            found, content = self.fs.find_one(key), Path(key["filename"]).read_bytes()
            file = found._id if found else self.fs.put(content, **key)
            if not found and self.fs.get(file).read() != content:
                raise TrackingError(f"the database has not stored {name}")
            stored.append([name, file])
        return stored

    def supersede(self, token: str | None, info: Any) -> None:
        """Let the killed run of another journal name this one, whose ``info`` names it."""
        self._set(info=info)
        change = {"status": "INTERRUPTED", "info.resumed_by": self.run_entry["_id"]}
        killed = {"meta.journal": {"$eq": token}, "status": {"$ne": "COMPLETED"}}
        try:
            if token is not None:
                self.runs.update_one(killed, {"$set": change})
        except Exception as error:  # whatever answers there may answer nonsense
            self._log.warning("the killed run is not marked: %s", self._database.explain(error))

    # ---- events of the run: journal only ----

    def _set(self, **fields: Any) -> None:
        """Write down fields of the run's document, as far as they have changed."""
        clean = {key: self._clean(value) for key, value in fields.items()}
        new = {k: v for k, v in clean.items() if k not in self._known or self._known[k] != v}
        if (size := len(bson.encode({**self._known, **new}))) > LARGEST_RECORD:
            raise TrackingError(
                f"info, result and output have {size >> 20} MiB, of which a document of MongoDB's"
                f" takes {LARGEST_RECORD >> 20}; put them into a file, and that into add_artifact"
            )
        if "captured_out" in new:
            before, text = self._known.get("captured_out", ""), new["captured_out"]
            same = text.startswith(before)  # unless a progress bar has redrawn its line
            kept = len(before if same else os.path.commonprefix([before, text]))
            self._journal.append({"output": [kept, text[kept:]]})
        if rest := {key: value for key, value in new.items() if key != "captured_out"}:
            self._journal.append({"set": rest})
        self._known.update(new)

    def record(self, name: str, value: float, step: int, when: datetime) -> None:
        """One point of a metric."""
        self._journal.append({"metric": name, "step": step, "value": value, "time": when})

    def log_metrics(self, metrics_by_name: Any, info: Any) -> None:
        pass  # `record` has written the points when they were logged

    def heartbeat_event(self, info: Any, captured_out: str, beat_time: datetime,
                        result: Any) -> None:
        try:
            self._set(captured_out=captured_out, info=info, result=result, heartbeat=beat_time)
            self._journal.sync()
        except Exception as error:  # after which Sacred calls no more of these
            self._lost = f"a part of the record is lost: {self._reason(error)}"
            raise TrackingError(self._lost) from error

    def completed_event(self, stop_time: datetime, result: Any) -> None:
        if self._lost:
            return self.failed_event(stop_time, [self._lost])
        self._set(stop_time=stop_time, result=result, status="COMPLETED")

    def interrupted_event(self, interrupt_time: datetime, status: str) -> None:
        self._set(stop_time=interrupt_time, status=status)

    def failed_event(self, fail_time: datetime, fail_trace: list[str]) -> None:
        self._set(stop_time=fail_time, fail_trace=fail_trace, status="FAILED")

    def resource_event(self, filename: str) -> None:
        listed = self._known.get("resources", [])
        if (resource := [filename, get_digest(filename)]) not in listed:
            self._set(resources=[*listed, resource])

    def artifact_event(self, name: str, filename: str, metadata: Any = None,
                       content_type: str | None = None) -> None:
        self._journal.append({
            "artifact": self._clean(name), "id": ObjectId(),
            "data": Binary(Path(filename).read_bytes()), "metadata": self._clean(metadata),
            "content_type": content_type or mimetypes.guess_type(filename)[0],
        })  # fmt: skip

    def _work(self) -> None:
        """Upload every few seconds; at the run's end until all is read back, or it is too late."""
        pause, ending = self._interval, False
        while not ending or (self._error and time.monotonic() < self._deadline):
            self._stop.wait(pause)
            ending, began, away = self._stop.is_set(), time.monotonic(), self._error
            try:
                if away:
                    self._database.revive()
                self._uploader.upload()
                if ending:
                    self._uploader.verify()
                self._error, self._stored = "", ending
            except Exception as error:  # it is away, refuses, or answers nonsense
                self._error = self._reason(error)
            if self._error and not away:
                text = "The database is away; the run goes on and keeps its record (%s)"
                self._log.warning(text, self._error)
            if away and not self._error:
                self._log.warning("The database is back")
            pause = max(self._interval, 5 * (time.monotonic() - began))
            time.sleep(0.5 if ending and self._error else 0.0)

    def finish(self) -> None:
        """Bring everything into the database, remove the journal, close the connection.

        The journal is kept after TrackingError: the database did not take everything.
        """
        path = self._journal.path
        try:
            if self._uploader is None:  # it may have been broken off just after it was inserted
                with suppress(Exception), pymongo.timeout(INTERRUPTED):
                    own = {"meta.journal": {"$eq": self.token}}
                    self.runs.update_one(own, {"$set": self._known})
            elif error := self._last_upload(self._uploader.reader):
                self._journal.seal()
                command = shlex.join(["python", "-m", uploader.COMMAND, str(path)])
                raise TrackingError(
                    f"run {self.run_entry['_id']} is not wholly in the database ({error}); its"
                    f" record is {path}: the next run uploads it, or {command}"
                )
            path.unlink()  # while locked, so that no other run takes it for abandoned
        finally:
            self._journal.close()
            if not self._thread.is_alive():  # else the end of the process closes all
                self._database.close()

    def _last_upload(self, reader: JournalReader) -> str:
        """Wait for it; what is wrong."""
        limit = (HURRIED if signals.urgent() else INTERRUPTED) if signals.asked() else None
        self._deadline = time.monotonic() + min(limit or math.inf, self._patience)
        self._stop.set()
        try:
            self._thread.join(limit)
        except KeyboardInterrupt as interrupt:
            return self._reason(interrupt)
        if self._thread.is_alive():
            return "no answer in time"
        reader.close()
        no_end = "" if "status" in self._known else "its end was not recorded"
        unknown = "" if self._stored else "the upload has broken off"
        return reader.damage or self._error or no_end or unknown

    def _reason(self, error: BaseException) -> str:
        return str(self._database.redacted(one_line(error).split(", Timeout:")[0]))
