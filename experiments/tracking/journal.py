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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bson import json_util

from experiments.tracking.errors import TrackingError
from experiments.tracking.socket_server import try_lock

Entry = dict[str, Any]
LINES, WIDTH = "lines", 12
LINE = re.compile(
    rb'\{"line": (0|[1-9]\d{0,15}), "check": "(\w{24})", "entry": (.*)\}\n', re.DOTALL
)


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
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # a FIFO would be waited for, a device may not end
            raise TrackingError(f"{path} is no regular file, so no journal")
        self._file = open(path, "r+b")  # a lock over NFS needs write access
        self.close = self._file.close
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first entry after the header."""
        self._file.seek(0)
        self._next, self._damage = 0, ""
        self.header: Entry = next(self.entries(), {})
        if self._damage:  # of the header, so that another line may have been taken for it
            self._file.seek(0)
            self._next, self.header = 0, {}

    def entries(self) -> Iterator[Entry]:
        """The complete lines not read yet, without those that are damaged."""
        while line := self._file.readline():
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            found = LINE.fullmatch(line)
            whole = found and _checksum(int(found[1]), found[3]).encode() == found[2]
            number = int(found[1]) if found and whole else -1
            if number != self._next and not self._damage:
                self._damage = f"line {self._next + 1} is damaged or missing"
            if found and number >= self._next:
                self._next = number + 1
                yield json.loads(found[3], object_hook=json_util.object_hook)

    @property
    def damage(self) -> str:
        """What is wrong with the file as far as read, in words; empty if nothing is."""
        cut = f"line {self._next + 1}, with all after it, is missing"
        whole = self.header and self._next >= int(self.header.get(LINES, 0))
        return self._damage or ("" if whole else cut)

    def is_abandoned(self) -> bool:
        """Whether its writer has ended; if so the lock is ours until `close`."""
        return try_lock(self._file.fileno())


def _line(number: int, entry: Entry) -> bytes:
    text = json.dumps(entry, default=json_util.default).encode()
    check = _checksum(number, text).encode()
    return b'{"line": %d, "check": "%s", "entry": %s}\n' % (number, check, text)


def _checksum(number: int, text: bytes) -> str:
    return hashlib.blake2b(b"%d %s" % (number, text), digest_size=12).hexdigest()
