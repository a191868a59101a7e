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
from pathlib import Path
from typing import Any

from bson import json_util

from experiments.tracking.errors import TrackingError

Entry = dict[str, Any]
LINES, WIDTH = "lines", 12


class Journal:
    """Append entries to a new file.

    Args:
        path: where the file is created (0600); it must not exist.
        header: the first entry.
    """

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
        """Write one line; it outlives this process, and after `sync` the machine.

        Raises:
            TrackingError: it cannot be written whole; nothing of it is left.
        """
        with self._guard:
            line = _line(self._lines, entry)
            try:
                if os.pwrite(self._descriptor, line, self._size) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._descriptor, self._size)
                raise self._full(error) from None
            self._lines, self._size = self._lines + 1, self._size + len(line)

    def seal(self) -> None:
        """Say in the first line how many there are, and force all to the disk."""
        line = _line(0, {**self._header, LINES: f"{self._lines:{WIDTH}}"})
        try:
            os.pwrite(self._descriptor, line, 0)  # as long as the one it replaces
        except OSError as error:
            raise self._full(error) from None
        self.sync()

    def sync(self) -> None:
        """Force what was written to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> TrackingError:
        return TrackingError(f"{self.path}: the record cannot be written ({error.strerror})")

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class JournalReader:
    """Read a journal from the start, also while it is being written.

    Attributes:
        header: the first entry; empty if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "r+b")  # a lock over NFS needs write access
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first entry after the header."""
        self._file.seek(0)
        self._next, self._damage = 0, ""
        self.header: Entry = next(self.entries(limit=1), {})
        if self._damage:  # of the header, so that another line may have been taken for it
            self._file.seek(0)
            self._next, self.header = 0, {}

    def entries(self, limit: int = -1) -> Iterator[Entry]:
        """The complete lines not read yet, without those that are damaged."""
        while limit and (line := self._file.readline()):
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            limit -= 1
            number, entry = _parse(line)
            if number != self._next and not self._damage:
                self._damage = f"line {self._next + 1} is damaged or missing"
            if number >= self._next:
                self._next = number + 1
                yield entry

    @property
    def damage(self) -> str:
        """What is wrong with the file as far as read, in words; empty if nothing is."""
        cut = f"line {self._next + 1}, with all after it, is missing"
        whole = self.header and self._next >= int(self.header.get(LINES, 0))
        return self._damage or ("" if whole else cut)

    def is_abandoned(self) -> bool:
        """Whether its writer has ended; if so the lock is ours until `close`."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


LINE = re.compile(
    rb'\{"line": (0|[1-9]\d{0,15}), "check": "(\w{24})", "entry": (.*)\}\n', re.DOTALL
)


def _line(number: int, entry: Entry) -> bytes:
    text = json.dumps(entry, default=json_util.default).encode()
    check = _checksum(number, text).encode()
    return b'{"line": %d, "check": "%s", "entry": %s}\n' % (number, check, text)


def _checksum(number: int, text: bytes) -> str:
    return hashlib.blake2b(b"%d %s" % (number, text), digest_size=12).hexdigest()


def _parse(line: bytes) -> tuple[int, Entry]:
    """The line's number and entry; -1 if it is not as it was written."""
    found = LINE.fullmatch(line)
    if found is None or _checksum(int(found[1]), found[3]).encode() != found[2]:
        return -1, {}
    return int(found[1]), json.loads(found[3], object_hook=json_util.object_hook)
