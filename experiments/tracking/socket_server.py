"""Run a server's program on a Unix socket of its owner's, as long as somebody needs it.

    python socket_server.py FOLDER SOCKET PROGRAM ARGUMENTS...

A port of the loopback interface is open to every user of the machine; a socket in a folder that
only its owner can enter is not, and whoever answers on it is the owner's. The program can open
nothing else: every socket it makes is this one. It ends when no client has held the shared lock
FOLDER/clients.lock for a while, or when its socket is gone; it does not start where another one
holds FOLDER/server.lock. Only the standard library is used, so that starting it is quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

CLIENTS_LOCK, SERVER_LOCK = "clients.lock", "server.lock"
LINGER = 2.0  # seconds the server is kept after its last client, for the next run of a sweep
POLL = 0.2
PATH = Path()
bound = threading.Event()


class OneSocket(socket.socket):
    """A Unix socket at `PATH`, for a program that was written for TCP."""

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1,
                 fileno: int | None = None) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno)

    def bind(self, address: Any) -> None:
        """Bind `PATH`, whatever the address."""
        PATH.unlink(missing_ok=True)  # of a server that was killed
        super().bind(str(PATH))
        bound.set()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, from an address like TCP's."""
        return super().accept()[0], ("owner", 0)

    def getsockname(self) -> Any:
        """An address like TCP's."""
        return str(PATH), 0


def open_lock(path: Path) -> int:
    """A file descriptor to flock; closing it releases the lock. OSError: also for a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def try_lock(descriptor: int, seconds: float = 0.0) -> bool:
    """Take the exclusive lock, if nobody holds any lock on the file, within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)


def is_free(path: Path) -> bool:
    """Whether nobody holds a lock on this file."""
    descriptor = open_lock(path)
    try:
        return try_lock(descriptor)
    finally:
        os.close(descriptor)


def end_when_nobody_is_there(clients: int) -> None:
    """The lock is then kept: a client that comes meanwhile waits, and starts the next server."""
    last = time.monotonic()
    while not bound.is_set() or PATH.is_socket():  # it may have been deleted
        if not try_lock(clients):
            last = time.monotonic()
        elif time.monotonic() - last >= LINGER:
            break
        else:
            fcntl.flock(clients, fcntl.LOCK_UN)
        time.sleep(POLL)
    for patience in (5.0, 3.0):  # a single SIGTERM is sometimes ignored under load
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
    os._exit(1)


if __name__ == "__main__":
    own_folder, PATH = Path(sys.argv[1]), Path(sys.argv[2])
    os.umask(0o077)
    if not try_lock(open_lock(own_folder / SERVER_LOCK), seconds=1.0):
        sys.exit()  # another serves; a client asks by taking the lock for a moment
    watched = (open_lock(own_folder / CLIENTS_LOCK),)
    threading.Thread(target=end_when_nobody_is_there, args=watched, daemon=True).start()
    socket.socket = OneSocket  # type: ignore[misc]
    sys.argv = sys.argv[3:]
    sys.path = [folder for folder in sys.path if folder != os.path.dirname(__file__)]
    runpy.run_path(sys.argv[0], run_name="__main__")
