"""A run's local record: one append-only file of JSON lines, written before the database.

The first line says which database and host; then come {"start": the run's document},
{"metric": name, "step", "value", "time"}, {"set": changed fields of the document},
{"output": [characters kept, text after them]} and {"artifact": name, ...}. The writing process
holds a lock on the file: a file whose lock is free belongs to a process that has ended.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bson import json_util

Entry = dict[str, Any]


class Journal:
    """Append entries to a new file.

    Args:
        path: where the file is created (0600); it must not exist.
        header: the first entry.
    """

    def __init__(self, path: Path, header: Entry) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._torn = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.append(header)

    def append(self, entry: Entry) -> None:
        """Write one line; it outlives this process, and after `sync` the machine."""
        line = json.dumps(entry, default=json_util.default).encode() + b"\n"
        with self._guard:
            whole = b"\n" + line if self._torn else line
            self._torn = True  # until the write is known to be whole
            self._torn = os.write(self._descriptor, whole) != len(whole)
        if self._torn:
            raise OSError(f"{self.path}: no space left for the run's journal")

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class JournalReader:
    """Read a journal from the start, also while it is being written.

    Attributes:
        header: the first entry.
        damaged: lines that could not be read so far.

    Raises:
        ValueError: the file is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "r+b")  # a lock over NFS needs write access
        self.damaged = 0
        self.header = next(self.entries(limit=1), {})
        if "token" not in self.header:
            raise ValueError(f"{path} is not the journal of a run: its first line names none")
        self._start = self._file.tell()

    def entries(self, limit: int | None = None) -> Iterator[Entry]:
        """The complete lines not read yet."""
        while limit is None or limit > 0:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(position, io.SEEK_SET)
                return
            limit = None if limit is None else limit - 1
            entry = _parse(line)
            if entry is not None:
                yield entry
            elif line.strip():
                self.damaged += 1

    def is_abandoned(self) -> bool:
        """Whether its writer has ended; if so the lock is ours until `close`."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def tell(self) -> int:
        """The position after the last entry read."""
        return self._file.tell()

    def seek(self, position: int) -> None:
        """Go back to a position."""
        self._file.seek(position, io.SEEK_SET)

    def rewind(self) -> None:
        """Go back to the first entry after the header."""
        self._file.seek(self._start, io.SEEK_SET)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line, object_hook=json_util.object_hook)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
