"""The embedded database, seen from a client: share the server that is up, or start it.

The server is SecantusDB, which speaks MongoDB's protocol. It is a separate process that listens
on loopback without a password: every user of this machine can reach it while it is up. Its files
are in a folder only its owner can read. Needs a POSIX system (flock).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.tracking import supervisor
from experiments.tracking.errors import UserError

EXECUTABLE = "secantusd-py"
DATA_VARIABLE = "L2L_IMPLICIT_DATA"
START_TIMEOUT = 40.0
NOT_INSTALLED = (
    "no database: the embedded MongoDB server is not installed;"
    ' `pip install "l2l_implicit[experiments]"`, or set L2L_IMPLICIT_MONGO_URL to a'
    " mongodb:// URL, or add -u to run without recording"
)


def data_folder(name: str) -> Path:
    """A folder that only its owner can read, under L2L_IMPLICIT_DATA or ~/.local/share."""
    default = "~/.local/share/l2l_implicit"
    root = Path(os.environ.get(DATA_VARIABLE) or default).expanduser().absolute()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root / name
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return folder


class EmbeddedServer:
    """A share in the embedded server: it stays up at least until `release`.

    Raises:
        UserError: the server is not installed, or does not start.
    """

    def __init__(self) -> None:
        self.folder = data_folder("mongodb")
        self._executable = _executable()
        self._share = os.open(
            self.folder / supervisor.CLIENTS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(self._share, fcntl.LOCK_SH)  # waits while a supervisor is stopping

    def port(self) -> int:
        """The port the server answers on; it is started first where it is not up."""
        with _start_lock(self.folder):
            deadline = time.monotonic() + START_TIMEOUT
            starting: subprocess.Popen[bytes] | None = None
            while time.monotonic() < deadline:
                if starting is None and not _is_supervised(self.folder):
                    starting = _start_supervisor(self.folder, self._executable)
                elif starting is not None and starting.poll() is not None:
                    break
                port = supervisor.read_server_file(self.folder).get("port", 0)
                if port and supervisor.answers(port):
                    return port
                time.sleep(0.05)
        raise UserError(
            f"the embedded MongoDB server does not start: {_last_line(self.folder)};"
            f" its log is {self.folder / 'server.log'}"
        )

    def release(self) -> None:
        """Give up the share; the server stops when it was the last one."""
        if self._share >= 0:
            os.close(self._share)
            self._share = -1


def _executable() -> str:
    """The server's program: beside this Python, else on the PATH."""
    beside = shutil.which(EXECUTABLE, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(EXECUTABLE)
    if found is None:
        raise UserError(NOT_INSTALLED)
    return found


@contextmanager
def _start_lock(folder: Path) -> Iterator[None]:
    with supervisor.open_lock(folder / "start.lock") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _is_supervised(folder: Path) -> bool:
    """Whether a supervisor runs; asked only under the start lock, since asking takes its lock."""
    with supervisor.open_lock(folder / supervisor.SUPERVISOR_LOCK) as descriptor:
        return not supervisor.try_lock(descriptor)


def _start_supervisor(folder: Path, executable: str) -> subprocess.Popen[bytes]:
    """Its own session, so that Ctrl-C at the terminal stops the run and not the database."""
    command = [sys.executable, "-I", supervisor.__file__, str(folder), executable]
    with open(folder / "supervisor.log", "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )


def _last_line(folder: Path) -> str:
    for name in ("server.log", "supervisor.log"):
        path = folder / name
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        for line in reversed(lines):
            if line.strip():
                return line.strip()
    return "no message"
