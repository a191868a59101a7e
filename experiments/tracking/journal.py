"""A run's local record: one append-only file of JSON lines, written before the database.

The first entry says which database and host; then come {"start": the run's document},
{"metric": name, "step", "value", "time"}, {"set": changed fields of the document},
{"output": [characters kept, text after them]} and {"artifact": name, ...}. Every line has its
number and a checksum, and once the run has ended the first one says how many there are: a line
that was changed, lost, doubled or cut off is noticed. The writing process holds a lock on the file:
a file whose lock is free belongs to a process that has ended.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

import bson
from bson import ObjectId, json_util

from experiments.tracking.config import once_each
from experiments.tracking.errors import TrackingError, reason
from experiments.tracking.socket_server import try_lock

Entry = dict[str, Any]
LINES, WIDTH = "lines", 12
LINE = re.compile(
    rb'\{"line": (0|[1-9]\d{0,15}), "check": "(\w{24})", "entry": (.*)\}\n', re.DOTALL
)
LINE_LIMIT = 32 * 2**20  # bytes of a line: an artifact has at most 16 MiB
# The parts of an entry by its first one, and of a run's document, which has at least `BEGUN`.
PARTS: dict[Any, dict[str, Any]] = {
    "token": {"token": object, LINES: str},
    "start": {"start": dict}, "set": {"set": dict}, "output": {"output": list},
    "metric": {"metric": str, "step": int, "value": (int, float), "time": datetime},
    "artifact": {"artifact": str, "id": ObjectId, "data": bytes, "metadata": object,
                 "content_type": (str, NoneType)},
}  # fmt: skip
DOCUMENT: dict[str, Any] = {
    "meta": dict, "config": dict, "info": dict, "experiment": dict, "host": dict, "status": str,
    "captured_out": str, "artifacts": list, "fail_trace": list, "start_time": datetime,
    "stop_time": datetime, "heartbeat": (datetime, NoneType),
}  # fmt: skip
FIRST = {"token": 0, "start": 1}  # the lines of these
BEGUN = ("_id", "meta", "status", "info", "artifacts")


class Journal:
    """Append entries to a new file (0600); ``header`` is the first. TrackingError: disk full."""

    def __init__(self, path: Path, header: Entry) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._lines, self._size, self._header = 0, 0, header
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            self.append({**header, LINES: f"{0:{WIDTH}}"})
        except TrackingError:
            path.unlink()
            raise

    def append(self, entry: Entry) -> None:
        """Write one line, or nothing; it outlives this process, and after `sync` the machine."""
        with self._guard, self._writing():
            line = _line(self._lines, entry)
            if os.pwrite(self._descriptor, line, self._size) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._lines, self._size = self._lines + 1, self._size + len(line)

    def seal(self) -> None:
        """Say in the first line how many there are, and force all to the disk."""
        line = _line(0, {**self._header, LINES: f"{self._lines:{WIDTH}}"})
        with self._writing():
            os.pwrite(self._descriptor, line, 0)  # as long as the one it replaces
        self.sync()

    def sync(self) -> None:
        """Force what was written to the disk."""
        with self._writing():
            os.fsync(self._descriptor)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            reason = f"the record cannot be written ({error.strerror})"
            raise TrackingError(f"{self.path}: {reason}") from None

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)


class JournalReader:
    """Read a journal from the start, also while it is being written.

    Attributes:
        header: the first entry; empty if it is damaged.
        count: of the lines that have been read.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # a FIFO would be waited for, a device may not end
            raise TrackingError(f"{path} is no regular file, so no journal")
        self._path, self._file = path, open(path, "r+b")  # a lock over NFS needs write access
        self.close = self._file.close
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first entry after the header."""
        self._file.seek(0)
        self.count, self._damage = 0, ""
        self.header: Entry = next(self.entries(), {})
        if self._damage:  # of the header, so that another line may have been taken for it
            self._file.seek(0)
            self.count, self.header = 0, {}

    def entries(self) -> Iterator[Entry]:
        """The complete lines not read yet, without those that are damaged.

        TrackingError: a line that is whole, and that no run has written.
        """
        while line := self._file.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT:
                raise self._foreign(f"more than {LINE_LIMIT >> 20} MiB")
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            found = LINE.fullmatch(line)
            whole = found and _checksum(int(found[1]), found[3]).encode() == found[2]
            number = int(found[1]) if found and whole else -1
            if number != self.count and not self._damage:
                self._damage = f"line {self.count + 1} is damaged or missing"
            if found and number >= self.count:
                try:
                    entry = json.loads(found[3], object_pairs_hook=_object)
                    _check(number, entry)
                except Exception as error:  # the readers raise what the text leads to
                    raise self._foreign(reason(error)) from error
                self.count = number + 1
                yield entry

    def _foreign(self, got: str) -> TrackingError:
        where, expected = f"{self._path}, line {self.count + 1}", "what a run writes there"
        return TrackingError(f"{where}: expected {expected}, got {got}; the file is left as it is")

    @property
    def damage(self) -> str:
        """What is wrong with the file as far as read, in words; empty if nothing is."""
        cut = f"line {self.count + 1}, with all after it, is missing"
        whole = self.header and self.count >= int(self.header.get(LINES, 0))
        return self._damage or ("" if whole else cut)

    def is_abandoned(self) -> bool:
        """Whether its writer has ended; if so the lock is ours until `close`."""
        return try_lock(self._file.fileno())


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    return json_util.object_hook(once_each(pairs))


def _check(number: int, entry: Any) -> None:
    """ValueError: no entry of this line, or one that MongoDB cannot hold."""
    bson.encode({**entry, "data": b""})
    kind = next(iter(entry), None)
    if kind not in PARTS or FIRST.get(kind, number or 1) != number:
        raise ValueError(f"an entry {kind!r}")
    _fits(entry, PARTS[kind], PARTS[kind])
    if kind == "token":
        int(entry[LINES])
    elif kind == "start":
        _fits(entry[kind], DOCUMENT, BEGUN)
        if "journal" not in entry[kind]["meta"]:
            raise ValueError("no name of a journal")
    elif kind == "set":
        _fits(entry[kind], {**DOCUMENT, "_id": (), "meta": ()})  # what nothing can be
    elif kind == "output" and list(map(type, entry[kind])) != [int, str]:
        raise ValueError("a wrong output")


def _fits(group: Mapping[str, Any], parts: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    """ValueError: something is missing in it, or of another type, or is no field."""
    wrong = {name for name in {*needed, *group} if not name.isidentifier() or name not in group
             or not isinstance(group[name], parts.get(name, object))}  # fmt: skip
    if wrong:
        raise ValueError(f"a wrong or missing {', '.join(sorted(wrong)) or repr('')}")


def _line(number: int, entry: Entry) -> bytes:
    text = json.dumps(entry, default=json_util.default).encode()
    check = _checksum(number, text).encode()
    return b'{"line": %d, "check": "%s", "entry": %s}\n' % (number, check, text)


def _checksum(number: int, text: bytes) -> str:
    return hashlib.blake2b(b"%d %s" % (number, text), digest_size=12).hexdigest()
