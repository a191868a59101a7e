"""The process that keeps the embedded MongoDB server alive while somebody needs it.

    python supervisor.py FOLDER SERVER_EXECUTABLE

It starts the server on loopback, starts it again on the same port if it dies, and stops it when
no client holds the shared lock any more. The server dies with this process, even on SIGKILL.
Only the standard library is used, so that starting it is quick.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

CLIENTS_LOCK = "clients.lock"
SUPERVISOR_LOCK = "supervisor.lock"
SERVER_FILE = "server.json"
LINGER = 2.0
"""Seconds the server is kept after its last client, for the next run of a sweep."""
POLL = 0.2
START_TIMEOUT = 30.0
RESTARTS = 10
"""Deaths of the server in a row, none of which had answered, before giving up."""
STOP_SIGNALS = ((signal.SIGTERM, 5.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))
"""A single SIGTERM is sometimes ignored under load, hence the second one."""
PR_SET_PDEATHSIG = 1


class Stop(Exception):
    """SIGTERM or SIGINT reached the supervisor."""


@contextlib.contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """A file descriptor to flock; closing it releases the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock if nobody holds any lock on the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_server_file(folder: Path) -> dict[str, int]:
    """{"port": ..., "server": process id} of the last server, empty if there was none."""
    try:
        return json.loads((folder / SERVER_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_server_file(folder: Path, port: int, server: int) -> None:
    """Publish the port; the rename makes readers see either the old file or the new one."""
    temporary = folder / f"{SERVER_FILE}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"port": port, "server": server}, file)
    temporary.replace(folder / SERVER_FILE)


def free_port(preferred: int | None) -> int:
    """`preferred` if it is free (running clients know it), else one the system chooses."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            if port is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def answers(port: int) -> bool:
    """Whether something accepts connections on this port of the loopback interface."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def die_with_parent() -> None:
    """Run in the child before exec: the kernel kills it when the supervisor ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_orphan(process: int) -> None:
    """Where the kernel cannot tie the two together: end the last supervisor's server."""
    if sys.platform != "linux":
        command = ["ps", "-p", str(process), "-o", "command="]
        if "secantusd" in subprocess.run(command, capture_output=True, text=True).stdout:
            os.kill(process, signal.SIGKILL)


def start_server(folder: Path, executable: str, port: int) -> subprocess.Popen[bytes]:
    """The server, on loopback, its data in FOLDER/data, its log in FOLDER/server.log."""
    config = folder / "empty.toml"  # keeps a stray ./secantusd.toml from being read
    config.write_text("")
    command = [executable, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--storage-path", str(folder / "data"), "--standalone", "--cache-size", "256M"]
    command += ["--log-level", "WARNING"]
    with open(folder / "server.log", "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            preexec_fn=die_with_parent,
        )


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """TERM, TERM, KILL."""
    for number, patience in STOP_SIGNALS:
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


def wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """False when the server ended, or did not answer within `START_TIMEOUT`."""
    deadline = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        if answers(port):
            return True
        time.sleep(0.05)
    return False


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


def watch(server: subprocess.Popen[bytes], clients: int) -> bool:
    """Block until nobody needs the server (True) or it has died (False)."""
    while server.poll() is None:
        if nobody_for(clients, LINGER):
            return True
        time.sleep(POLL)
    return False


def supervise(folder: Path, executable: str, clients: int) -> None:
    """Serve until nobody needs the server, or it cannot be started any more."""
    last = read_server_file(folder)
    kill_orphan(last.get("server", 0))
    port = last.get("port")
    failures = 0
    while failures < RESTARTS:
        port = free_port(port)
        server = start_server(folder, executable, port)
        try:
            if wait_until_it_answers(server, port):
                failures = 0
                write_server_file(folder, port, server.pid)
                if watch(server, clients):
                    return
            failures += 1
        finally:
            if server.poll() is None:
                stop_server(server)
        time.sleep(POLL)


def raise_stop(signum: int, frame: FrameType | None) -> None:
    raise Stop


def main(folder: Path, executable: str) -> None:
    """Supervise, unless another supervisor already does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_stop)
    with open_lock(folder / CLIENTS_LOCK) as clients, open_lock(folder / SUPERVISOR_LOCK) as own:
        if try_lock(own):
            with contextlib.suppress(Stop):
                supervise(folder, executable, clients)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
