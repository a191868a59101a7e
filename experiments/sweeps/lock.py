"""No cell runs twice at a time, on any number of machines and schedulers that share a database.

Invariant: a cell is trained by the process whose token its document in `sweep_locks` holds. The
document is replaced and deleted by single atomic updates. Besides, holder and training keep a file
locked, which stays: on one machine a free one says at once that both have ended. Elsewhere a holder
counts ``beat`` up, and has died when the same number has been seen for a whole lease by the
watcher's own clock; clocks of two machines are never compared.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pymongo import WriteConcern
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError

from experiments.tracking import socket_server
from experiments.tracking.database import Database
from experiments.tracking.embedded import data_folder

LEASE = 300.0  # seconds without a beat after which a holder on another machine is taken for dead
Document = dict[str, Any]


def _locks(database: Database) -> Collection[Document]:
    # majority: a lock must not be undone by a fail-over
    return database.documents.get_collection("sweep_locks", write_concern=WriteConcern("majority"))


def token_of(database: Database) -> str:
    """What tells this database from any other, whatever the address it is reached by."""
    own, new = {"_id": "database"}, {"$set": {"token": uuid.uuid4().hex}}
    with suppress(DuplicateKeyError):  # it has one
        _locks(database).update_one({**own, "token": None}, new, upsert=True)
    return str((_locks(database).find_one(own) or {}).get("token"))


class Lock:
    """The right to train one cell.

    A scheduler never runs a cell on two of its workers, so what it gives again was lost.
    `descriptor` is of the locked file, for the training to inherit; -1 without it.
    """

    def __init__(self, database: Database, identity: str, scheduler: str) -> None:
        self._locks, self.descriptor = _locks(database), -1
        self._key = {"_id": identity, "token": uuid.uuid4().hex}
        self._holder = {"place": _place(), "scheduler": scheduler, "host": platform.node(),
                        "process": os.getpid(), "beat": 0}

    def take(self) -> bool:
        """Whether the lock is this one's now; asked again after a failure, it says the same."""
        if self.descriptor < 0:
            self.descriptor = socket_server.open_lock(_file(self._key["_id"]))
            if not socket_server.try_lock(self.descriptor):
                self.close()
                return False
        # Nobody has it, this one, or one that has died: its file is free, its scheduler gives again
        own = {"token": self._key["token"], **self._holder}
        may = [{key: own[key]} for key in ("token", "place", "scheduler")]
        try:
            self._locks.replace_one({"_id": self._key["_id"], "$or": may}, own, upsert=True)
            return True
        except DuplicateKeyError:
            self.close()
            return False

    def beat(self) -> bool:
        """Say that this process lives; False if the lock has been taken from it."""
        return self._locks.update_one(self._key, {"$inc": {"beat": 1}}).matched_count > 0

    def release(self) -> None:
        """Give the lock up, unless it has been taken; then `close` the file."""
        self._locks.delete_one(self._key)

    def close(self) -> None:
        """Give the file up, whatever the database has said."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Watch:
    """Who holds which locks, seen from a process that holds none."""

    def __init__(self, database: Database) -> None:
        self._locks = _locks(database)
        self._seen: dict[str, tuple[Any, float, float]] = {}

    def holders(self, identities: Iterable[str]) -> dict[str, Document]:
        """The locks of these cells; one whose holder has died is removed."""
        found = {}
        for lock in self._locks.find({"_id": {"$in": list(identities)}}):
            if self._has_died(lock):
                self._locks.delete_one({key: lock.get(key) for key in ("_id", "token", "beat")})
            else:
                found[lock.get("_id")] = lock
        return found

    def _has_died(self, lock: Document) -> bool:
        if lock.get("place") == _place():
            return socket_server.is_free(_file(lock["_id"]))
        now, sign = time.monotonic(), (lock.get("token"), lock.get("beat"))
        last, since, looked = self._seen.get(lock.get("_id"), (None, now, now))
        if sign != last or now - looked > LEASE / 4:
            since = now  # a database that was away has kept the holder from beating
        self._seen[lock.get("_id")] = sign, since, now
        return now - since > LEASE


def _place() -> str:
    """Where a file's lock tells whether its holder lives."""
    return f"{platform.node()}:{data_folder('sweeps')}"


def _file(identity: str) -> Path:
    """The cell's, which is locked while somebody here trains it."""
    return data_folder("sweeps") / f"{identity}.lock"
