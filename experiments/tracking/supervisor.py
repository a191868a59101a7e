"""The process that keeps the embedded MongoDB server alive while somebody needs it.

    python supervisor.py FOLDER SOCKET SERVER_PROGRAM

It starts the server on the socket, starts it again if it dies or its socket is gone, and stops it
when no client holds the shared lock any more. The server ends with this process, even on SIGKILL.
Exit status 1 if the server does not start. Only the standard library is used, so that starting it
is quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLIENTS_LOCK = "clients.lock"
SUPERVISOR_LOCK = "supervisor.lock"
LINGER = 2.0
"""Seconds the server is kept after its last client, for the next run of a sweep."""
POLL = 0.2
START_TIMEOUT = 30.0
RESTARTS = 10
"""Deaths of the server in a row, none of which had answered, before giving up."""
STOP_SIGNALS = ((signal.SIGTERM, 5.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))
"""A single SIGTERM is sometimes ignored under load, hence the second one."""


@contextlib.contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """A file descriptor to flock; closing it releases the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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


def answers(path: Path) -> bool:
    """Whether a server accepts connections on this socket."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        return True
    return False


def start_server(folder: Path, path: Path, program: str) -> subprocess.Popen[bytes]:
    """The server, on the socket, its data in FOLDER/data, its log in FOLDER/server.log."""
    path.unlink(missing_ok=True)  # of a server that was killed
    config = folder / "empty.toml"  # keeps a stray ./secantusd.toml from being read
    config.write_text("")
    listener = str(Path(__file__).with_name("socket_server.py"))
    command = [sys.executable, listener, str(path), program, "--config", str(config)]
    command += ["--storage-path", str(folder / "data"), "--standalone", "--cache-size", "256M"]
    command += ["--log-level", "WARNING"]
    with open(folder / "server.log", "ab") as log:  # its input is a pipe: it ends when we do
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=log, stderr=log, cwd=folder)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """TERM, TERM, KILL; nothing if it has ended."""
    for number, patience in STOP_SIGNALS:
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


def nobody_for(clients: int, seconds: float) -> bool:
    """Whether no client has held the lock for this long; the lock is then kept, so that a
    client that comes meanwhile waits until this process has ended, and starts the next one."""
    deadline = time.monotonic() + seconds
    while try_lock(clients):
        if time.monotonic() >= deadline:
            return True
        fcntl.flock(clients, fcntl.LOCK_UN)
        time.sleep(POLL)
    return False


def supervise(folder: Path, path: Path, program: str, clients: int) -> int:
    """Serve until nobody needs the server (0), or it cannot be started any more (1)."""
    failures = 0
    while failures < RESTARTS:
        failures += 1
        server, deadline = start_server(folder, path, program), time.monotonic() + START_TIMEOUT
        up = False
        try:
            while server.poll() is None and not up and time.monotonic() < deadline:
                time.sleep(0.02)
                up = answers(path)
            while server.poll() is None and up and path.is_socket():  # it may have been deleted
                failures = 0
                if nobody_for(clients, LINGER):
                    return 0
                time.sleep(POLL)
        finally:
            stop_server(server)
        time.sleep(POLL)
    return 1


if __name__ == "__main__":
    own_folder = Path(sys.argv[1])
    os.umask(0o077)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        open_lock(own_folder / CLIENTS_LOCK) as clients_lock,
        open_lock(own_folder / SUPERVISOR_LOCK) as own_lock,
        contextlib.suppress(KeyboardInterrupt),
    ):
        if try_lock(own_lock, seconds=1.0):  # another supervises; a client asks for a moment
            sys.exit(supervise(own_folder, Path(sys.argv[2]), sys.argv[3], clients_lock))
