"""The embedded database, seen from a client: share the server that is up, or start it.

The server is SecantusDB, which speaks MongoDB's protocol. It is a process of its own that listens
on a Unix socket in a folder which only its owner can enter: no password, and no port. Needs a
POSIX system (flock).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from experiments.tracking import supervisor
from experiments.tracking.errors import UserError

EXECUTABLE = "secantusd-py"
DATA_VARIABLE = "L2L_IMPLICIT_DATA"
START_TIMEOUT = 40.0
LONGEST_PATH = 100
"""Bytes: a socket's path has at most 103 on macOS, 107 on Linux."""

NOT_INSTALLED = (
    "no database: the embedded MongoDB server is not installed;"
    ' `pip install "l2l_implicit[experiments]"`, or set L2L_IMPLICIT_MONGO_URL to a'
    " mongodb:// URL, or add -u to run without recording"
)


def data_folder(name: str) -> Path:
    """A folder that only its owner can enter, under L2L_IMPLICIT_DATA or ~/.local/share.

    Raises:
        UserError: it belongs to somebody else, or cannot be made.
    """
    root = os.environ.get(DATA_VARIABLE) or "~/.local/share/l2l_implicit"
    return _private(Path(root).expanduser().absolute() / name)


def _private(folder: Path) -> Path:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # which only its owner, or root, can
        if folder.stat().st_uid == os.geteuid():
            return folder
        reason: str | None = "it belongs to somebody else"
    except OSError as error:
        reason = error.strerror
    raise UserError(f"no folder {folder} of your own: {reason}; {DATA_VARIABLE} names another")


def _socket(folder: Path) -> Path:
    """Where the server of this folder listens; elsewhere if the folder's name is too long."""
    path = folder / "mongodb.sock"
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    short = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:20]
    return _private(Path("/tmp") / f"l2l_implicit-{os.geteuid()}") / f"{short}.sock"


class EmbeddedServer:
    """A share in the embedded server: it stays up at least until `release`.

    Attributes:
        host: the server's address as it stands in a URL.

    Raises:
        UserError: the server is not installed, or does not start.
    """

    def __init__(self) -> None:
        self.folder = data_folder("mongodb")
        self._socket = _socket(self.folder)
        self.host = quote(str(self._socket), safe="")
        beside = shutil.which(EXECUTABLE, path=str(Path(sys.executable).parent))
        self._program = beside or shutil.which(EXECUTABLE)
        if self._program is None:
            raise UserError(NOT_INSTALLED)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._share = os.open(self.folder / supervisor.CLIENTS_LOCK, flags, 0o600)
        fcntl.flock(self._share, fcntl.LOCK_SH)  # waits while a supervisor is stopping

    def start(self) -> None:
        """Return when the server answers; it is started first where it is not up."""
        deadline = time.monotonic() + START_TIMEOUT
        started: subprocess.Popen[bytes] | None = None
        while not supervisor.answers(self._socket):
            failed = started is not None and started.poll() not in (None, 0)
            if failed or time.monotonic() > deadline:
                logs = [self.folder / name for name in ("supervisor.log", "server.log")]
                texts = [path.read_text(errors="replace") for path in logs if path.exists()]
                last = ("\n".join(texts).strip() or "no message").splitlines()[-1]
                raise UserError(
                    f"the embedded MongoDB server does not start: {last}; its log is {logs[1]}"
                )
            if (started is None or started.poll() == 0) and not self._is_supervised():
                started = self._start_supervisor()
            time.sleep(0.02)

    def _is_supervised(self) -> bool:
        with supervisor.open_lock(self.folder / supervisor.SUPERVISOR_LOCK) as descriptor:
            return not supervisor.try_lock(descriptor)

    def _start_supervisor(self) -> subprocess.Popen[bytes]:
        """Its own session, so that Ctrl-C at the terminal stops the run and not the database."""
        words = [supervisor.__file__, str(self.folder), str(self._socket), str(self._program)]
        with open(self.folder / "supervisor.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def release(self) -> None:
        """Give up the share; the server stops when it was the last one."""
        if self._share >= 0:
            os.close(self._share)
            self._share = -1
