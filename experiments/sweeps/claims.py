"""Who runs which cell: one document a cell, changed by single atomic updates only.

Invariant: a cell is run by the process whose token its document holds, and by no other.

No clock is compared with another machine's. An owner counts its document's ``beat`` up. Whoever
waits takes the cell over after having seen one and the same value for a whole lease, timed by its
own monotonic clock while the database answered; the owner stops its training when none of its
beats has been acknowledged for four fifths of a lease. (Server time would need $$NOW inside a
filter, which not every server of this protocol has.) On one machine nobody waits: an owner and
its training hold a lock on a file, and a lock that is free says that both have ended.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pymongo import WriteConcern
from pymongo.collection import Collection

from experiments.tracking.database import Database
from experiments.tracking.embedded import data_folder

COLLECTION = "sweep_cells"
LEASE_VARIABLE = "L2L_IMPLICIT_SWEEP_LEASE"
DEFAULT_LEASE = 300.0
ATTEMPTS = 2
"""A cell that has failed so often is reported and not run again."""

Document = dict[str, Any]


def lease_seconds() -> float:
    """The lease; all workers of a database must agree on it."""
    return float(os.environ.get(LEASE_VARIABLE) or DEFAULT_LEASE)


class Owner:
    """A process that may hold a claim; its lock is inherited by the training it starts.

    Args:
        token: what the claim's document holds.

    Attributes:
        descriptor: of the locked file.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self._path = lock_path(token)
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def close(self, released: bool) -> None:
        """Give up the lock; the file stays where a claim is left, to say that its owner ended."""
        if released:
            self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def lock_path(token: str) -> Path:
    """The file that the owner of this token keeps locked."""
    return data_folder("sweeps") / f"{token}.lock"


def has_ended(token: str, host: str) -> bool | None:
    """Whether the owner and its training have ended; None where this machine cannot tell."""
    path = lock_path(token)
    if host != platform.node() or not path.exists():
        return None
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class Claims:
    """The claims as one process sees them.

    Args:
        database: shared by all workers.
        token: of this process; empty for one that only looks.
    """

    def __init__(self, database: Database, token: str = "") -> None:
        self._database, self._token = database, token
        self.lease = lease_seconds()
        self._seen: dict[str, tuple[Any, float, float]] = {}

    @property
    def _cells(self) -> Collection[Document]:
        # majority: a claim must not be undone by a fail-over
        documents = self._database.documents
        return documents.get_collection(COLLECTION, write_concern=WriteConcern(w="majority"))

    def find(self, identities: Iterable[str]) -> dict[str, Document]:
        """The documents of these cells, by identity; a cell never claimed has none."""
        wanted = {"_id": {"$in": list(identities)}}
        return {document["_id"]: document for document in self._cells.find(wanted)}

    def take(self, identity: str, name: str) -> bool:
        """Claim a free cell; also true if this process holds it (an answer may get lost)."""
        new = {"state": "free", "beat": 0, "failures": [], "token": None}
        self._cells.update_one(
            {"_id": identity}, {"$setOnInsert": {**new, "name": name}}, upsert=True
        )
        free = {"$or": [{"state": "free"}, {"state": "claimed", "token": self._token}]}
        return self._own({"_id": identity, **free})

    def take_over(self, document: Document) -> bool:
        """Claim a cell whose owner has died, as far as can be known; see the module."""
        if not self._is_abandoned(document):
            return False
        same = {key: document[key] for key in ("_id", "state", "token", "beat")}
        if not self._own(same):
            return False
        if document["host"] == platform.node():
            lock_path(document["token"]).unlink(missing_ok=True)
        return True

    def _own(self, condition: Document) -> bool:
        here = {"host": platform.node(), "process": os.getpid()}
        mine = {"state": "claimed", "token": self._token, **here}
        change = {"$set": mine, "$inc": {"beat": 1}}
        return self._cells.find_one_and_update(condition, change) is not None

    def _is_abandoned(self, document: Document) -> bool:
        ended = has_ended(document["token"], document["host"])
        return self._is_silent(document) if ended is None else ended

    def _is_silent(self, document: Document) -> bool:
        """Whether the beat has stood still for a lease, looked at often enough to be sure."""
        now, sign = time.monotonic(), (document["token"], document["beat"])
        last_sign, since, last_look = self._seen.get(document["_id"], (None, now, now))
        if sign != last_sign or now - last_look > self.lease / 4:
            since = now  # a database that was away has kept the owner from beating
        self._seen[document["_id"]] = (sign, since, now)
        return now - since > self.lease

    def beat(self, identity: str) -> bool:
        """Say that this process lives; False if the cell has been taken from it."""
        held = {"_id": identity, "state": "claimed", "token": self._token}
        return self._cells.update_one(held, {"$inc": {"beat": 1}}).matched_count == 1

    def release(self, identity: str) -> None:
        """Give the cell back: done, or stopped by the user."""
        self._end(identity, self._token, {"$set": {"state": "free", "token": None}})

    def fail(self, identity: str, reason: str) -> None:
        """Give the cell back after a failure; after `ATTEMPTS` of them nobody takes it again."""
        self._fail(identity, self._token, reason)

    def bury(self, token: str, reason: str) -> int:
        """The owner of this token was killed: a failure of the cells it held; how many."""
        held = list(self._cells.find({"state": "claimed", "token": token}, {"_id": 1}))
        for document in held:
            self._fail(document["_id"], token, reason)
        lock_path(token).unlink(missing_ok=True)
        return len(held)

    def forgive(self, identities: Iterable[str]) -> None:
        """Let cells that have failed be run again."""
        failed = {"_id": {"$in": list(identities)}, "state": "failed"}
        self._cells.update_many(failed, {"$set": {"state": "free", "failures": []}})

    def _fail(self, identity: str, token: str, reason: str) -> None:
        document = self._cells.find_one({"_id": identity})
        failures = [*(document or {}).get("failures", []), reason]
        state = "failed" if len(failures) >= ATTEMPTS else "free"
        change = {"state": state, "token": None, "failures": failures}
        self._end(identity, token, {"$set": change})

    def _end(self, identity: str, token: str, change: Document) -> None:
        held = {"_id": identity, "state": "claimed", "token": token}
        self._cells.update_one(held, change)
