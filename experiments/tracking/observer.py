"""Between Sacred's run and the database: a journal first, an upload in the background.

Sacred drops an observer for good at its first error and still ends the run as COMPLETED. Here
the database may go away and come back: the run only ever writes to its journal.
"""

from __future__ import annotations

import logging
import mimetypes
import os
import platform
import threading
import time
import uuid
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pymongo.errors
from bson import Binary, ObjectId
from bson.errors import BSONError
from sacred.dependencies import get_digest
from sacred.observers import MongoObserver
from sacred.utils import SacredInterrupt

from experiments.tracking.database import Database
from experiments.tracking.embedded import data_folder
from experiments.tracking.errors import TrackingError, UserError
from experiments.tracking.journal import Journal, JournalReader
from experiments.tracking.last_upload import LastUpload
from experiments.tracking.uploader import (
    Uploader,
    index_metrics,
    next_run_id,
    upload_abandoned,
)
from experiments.tracking.values import storable

DEFAULT_INTERVAL = 10.0
FAILURES = (pymongo.errors.PyMongoError, BSONError, TrackingError, UserError, OSError)
"""The database is away or refuses a document, or the embedded server could not be started."""


class JournalObserver(MongoObserver):
    """Record one run in a journal, and from there in MongoDB.

    Args:
        database: where the run is recorded; closed by `finish`.
        log: told when the database goes away and comes back.
        interval: seconds between two uploads.
    """

    def __init__(self, database: Database, log: logging.Logger, interval: float) -> None:
        super().__init__(client=database.client, db_name=database.documents.name)
        self._database = database
        self._log = log
        self._interval = interval or DEFAULT_INTERVAL
        self._folder = data_folder("journals")
        self._redact = database.redactor
        self._token = uuid.uuid4().hex
        self._journal: Journal | None = None
        self._uploader: Uploader | None = None
        self._known: dict[str, Any] = {}
        self._output = ""
        self._ended = False
        self._away = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._last: LastUpload | None = None
        upload_abandoned(database, self._folder, log)

    # ---- the run's start: written to the database at once, which gives the run's number ----

    def started_event(self, ex_info: Any, command: str, host_info: Any, start_time: datetime,
                      config: Any, meta_info: Any, _id: Any) -> Any:
        """Insert the run's document, without secrets; every later event goes to the journal."""
        header = {"token": self._token, "database": self._database.label}
        path = self._folder / f"run-{self._token}.jsonl"
        self._journal = Journal(path, {**header, "host": platform.node()})
        meta_info = {**meta_info, "journal": self._token}
        _id = int(_id) if isinstance(_id, str) and _id.isdecimal() else _id  # Sacred's -i 7
        clean = [self._clean(part) for part in (ex_info, host_info, config, meta_info)]
        try:
            index_metrics(self._database.documents)
            run_id = super().started_event(
                clean[0], command, clean[1], start_time, clean[2], clean[3], _id
            )
        except pymongo.errors.PyMongoError as error:
            self._journal.close()
            path.unlink()  # nothing has happened that it could tell of
            self._journal = None
            raise UserError(self._database.explain(error)) from None
        self._journal.append({"start": self.run_entry})
        self._uploader = Uploader(JournalReader(path), self._database.documents)
        self._thread.start()
        return run_id

    def queued_event(self, ex_info: Any, command: str, host_info: Any, queue_time: datetime,
                     config: Any, meta_info: Any, _id: Any) -> Any:
        """Insert the queued run's document, without secrets."""
        clean = [self._clean(part) for part in (ex_info, host_info, config, meta_info)]
        self._ended = True
        return super().queued_event(
            clean[0], command, clean[1], queue_time, clean[2], clean[3], _id
        )

    def _clean(self, value: Any) -> Any:
        return self._redact.tree(storable(value))

    def insert(self) -> None:
        """Insert the run's document under the next free number."""
        numbered = self.run_entry.get("_id") is None
        while True:
            if numbered:
                self.run_entry["_id"] = next_run_id(self.runs)
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
            found = self.fs.find_one(key)
            content = None if found else Path(key["filename"]).read_bytes()
            stored.append([name, found._id if found else self.fs.put(content, **key)])
        return stored

    @property
    def token(self) -> str:
        """The name of this run's journal, recorded as ``meta.journal``: unique to the run."""
        return self._token

    def supersede(self, token: str | None, info: Any) -> None:
        """Let the killed run of another journal name this one, whose ``info`` names it."""
        self._append_changed(info=info)
        if token is None:
            return
        change = {"status": "INTERRUPTED", "info.resumed_by": self.run_entry["_id"]}
        try:
            self.runs.update_one(
                {"meta.journal": token, "status": {"$ne": "COMPLETED"}}, {"$set": change}
            )
        except pymongo.errors.PyMongoError as error:
            self._log.warning("the killed run is not marked: %s", self._redact.text(str(error)))

    @property
    def label(self) -> str:
        """The database's address without passwords, or `embedded`."""
        return self._database.label

    # ---- events of the run: journal only ----

    def _append(self, entry: dict[str, Any]) -> None:
        if self._journal is None:
            raise TrackingError("the run has no journal: it did not start")
        self._journal.append(entry)

    def _append_changed(self, **fields: Any) -> None:
        changed = {key: self._clean(value) for key, value in fields.items()}
        changed = {key: value for key, value in changed.items() if self._is_new(key, value)}
        if changed:
            self._append({"set": changed})
            self._known.update(changed)

    def _is_new(self, key: str, value: Any) -> bool:
        return key not in self._known or self._known[key] != value

    def record(self, name: str, value: float, step: int, when: datetime) -> None:
        """One point of a metric."""
        self._append({"metric": name, "step": step, "value": value, "time": when})

    def log_metrics(self, metrics_by_name: Any, info: Any) -> None:
        """Nothing: `record` has written the points when they were logged."""

    def heartbeat_event(self, info: Any, captured_out: str, beat_time: datetime,
                        result: Any) -> None:
        """The run's state that has changed since the last heartbeat."""
        text = self._redact.text(captured_out)
        if text != self._output:
            kept = len(self._output)
            if not text.startswith(self._output):  # a progress bar has redrawn its line
                kept = len(os.path.commonprefix([self._output, text]))
            self._append({"output": [kept, text[kept:]]})
            self._output = text
        self._append_changed(info=info, result=result, heartbeat=beat_time)
        if self._journal is not None:
            self._journal.sync()

    def _end(self, **fields: Any) -> None:
        self._append_changed(**fields)
        self._ended = True

    def completed_event(self, stop_time: datetime, result: Any) -> None:
        """The run's end."""
        self._end(stop_time=stop_time, result=result, status="COMPLETED")

    def interrupted_event(self, interrupt_time: datetime, status: str) -> None:
        """The run's end by a signal, Ctrl-C or a time limit."""
        self._end(stop_time=interrupt_time, status=status)

    def failed_event(self, fail_time: datetime, fail_trace: list[str]) -> None:
        """The run's end by an error."""
        self._end(stop_time=fail_time, fail_trace=fail_trace, status="FAILED")

    def resource_event(self, filename: str) -> None:
        """The name and md5 of a file that the run reads."""
        listed = self._known.get("resources", [])
        if (resource := [filename, get_digest(filename)]) not in listed:
            self._append_changed(resources=[*listed, resource])

    def artifact_event(self, name: str, filename: str, metadata: Any = None,
                       content_type: str | None = None) -> None:
        """The content of a file that the run has made."""
        entry = {
            "artifact": name,
            "id": ObjectId(),
            "data": Binary(Path(filename).read_bytes()),
            "metadata": self._clean(metadata),
            "content_type": content_type or mimetypes.guess_type(filename)[0],
        }
        self._append(entry)

    # ---- the upload ----

    def _work(self) -> None:
        pause = self._interval
        while self._uploader is not None and not self._stop.wait(pause):
            began = time.monotonic()
            self._try_upload(self._uploader)
            pause = max(self._interval, 5 * (time.monotonic() - began))

    def _try_upload(self, uploader: Uploader) -> Exception | None:
        """One attempt; the error if the database is away."""
        try:
            if self._away:
                self._database.revive()
            uploader.documents = self._database.documents
            uploader.upload()
        except FAILURES as error:
            if not self._away:
                self._log.warning("The database is away; the run goes on and keeps its record")
            self._away = True
            return error
        if self._away:
            self._log.warning("The database is back")
        self._away = False
        return None

    def finish(self) -> None:
        """Bring everything into the database, remove the journal, close the connection.

        Raises:
            TrackingError: the database did not take everything; the journal is kept.
        """
        try:
            if self._journal is not None:
                self._finish(self._journal)
        finally:
            if not self._is_left_behind():  # else the end of the process closes all
                self._database.close()

    def _is_left_behind(self) -> bool:
        return self._last is not None and self._last.is_left_behind()

    def _finish(self, journal: Journal) -> None:
        error: BaseException | None = None
        if self._uploader is not None:
            self._stop.set()
            self._last = LastUpload(partial(self._try_upload, self._uploader), self._thread)
            try:
                error = self._last.run()
            except (KeyboardInterrupt, SacredInterrupt) as interrupt:
                error = interrupt
            if not self._is_left_behind():
                self._uploader.close()
        journal.sync()
        if error is None and self._ended:
            journal.path.unlink()  # while locked, so that no other run takes it for abandoned
        journal.close()
        if error is not None or not self._ended:
            raise TrackingError(self._advice(journal.path, error))

    def _advice(self, path: Path, error: BaseException | None) -> str:
        run_id = self.run_entry["_id"]
        if error is None:
            return f"the end of run {run_id} was not recorded; its record is {path}"
        reason = self._redact.text(str(error).split(", Timeout:")[0]) or type(error).__name__
        return (
            f"run {run_id} is not wholly in the database ({reason}); its record is {path}:"
            f" the next run uploads it, or python -m experiments.tracking.upload {path}"
        )
