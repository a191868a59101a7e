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
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from experiments.tracking import socket_server
from experiments.tracking.errors import UserError

EXECUTABLE = "secantusd-py"
DATA_VARIABLE = "L2L_IMPLICIT_DATA"
# Seconds until it must answer, and how often it may end before it does.
START_TIMEOUT, STARTS = 40.0, 3
LONGEST_PATH = 100  # bytes: a socket's path has at most 103 on macOS, 107 on Linux
NOT_INSTALLED = (
    "no database: the embedded MongoDB server is not installed;"
    ' `pip install "l2l_implicit[experiments]"`, or set L2L_IMPLICIT_MONGO_URL to a'
    " mongodb:// URL, or add -u to run without recording"
)


def data_folder(name: str) -> Path:
    """A folder that only its owner can enter, under L2L_IMPLICIT_DATA or ~/.local/share.

    UserError: it belongs to somebody else, or cannot be made.
    """
    root = os.environ.get(DATA_VARIABLE) or "~/.local/share/l2l_implicit"
    try:
        folder = Path(root).expanduser().absolute() / name
        str(folder).encode()  # which the server has to read
    except (RuntimeError, UnicodeError, OSError):
        needed = "a home for ~, a current folder that is there, and a name in UTF-8"
        what = f"expected {needed}, got {root!r}"
        raise UserError(f"{what}; {DATA_VARIABLE} names another") from None
    return _private(folder)


def _private(folder: Path) -> Path:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if {folder.stat().st_uid, folder.lstat().st_uid} == {os.geteuid()}:  # and the link to it
            folder.chmod(0o700)
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


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the embedded MongoDB server cannot use its folder: {error}; mend or remove that"
        ) from None


class EmbeddedServer:
    """A share in the embedded server: it stays up at least until `release`.

    `host` is its address as it stands in a URL. UserError: it is not installed, or does not start.
    """

    def __init__(self) -> None:
        self.folder = data_folder("mongodb")
        self._socket = _socket(self.folder)
        self.host = quote(str(self._socket), safe="")
        beside = shutil.which(EXECUTABLE, path=os.path.dirname(sys.executable))
        self._program = beside or shutil.which(EXECUTABLE)
        if self._program is None:
            raise UserError(NOT_INSTALLED)
        with _in_one_line():
            self._share = socket_server.open_lock(self.folder / socket_server.CLIENTS_LOCK)
            fcntl.flock(self._share, fcntl.LOCK_SH)  # waits while a server is stopping

    def start(self) -> None:
        """Return when the server answers; it is started first where it is not up."""
        deadline, failures, log = time.monotonic() + START_TIMEOUT, 0, self.folder / "server.log"
        started: subprocess.Popen[bytes] | None = None
        while not self._answers():
            if started is not None and (ended := started.poll()) is not None:
                started, failures = None, failures + (ended != 0)  # 0: another one was quicker
            if failures == STARTS or time.monotonic() > deadline:
                text = log.read_text(errors="replace") if log.exists() else ""
                last = (text.strip() or "no message").splitlines()[-1]
                raise UserError(
                    f"the embedded MongoDB server does not start: {last}; its log is {log}"
                )
            with _in_one_line():
                lock = self.folder / socket_server.SERVER_LOCK
                if started is None and socket_server.is_free(lock):
                    started = self._start_server(log)
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(str(self._socket)) == 0

    def _start_server(self, log: Path) -> subprocess.Popen[bytes]:
        """Its own session, so that Ctrl-C at the terminal stops the run and not the database."""
        config = self.folder / "empty.toml"  # keeps a stray ./secantusd.toml from being read
        for path in (config, log):
            if path.is_fifo():
                raise OSError(f"{path} is a FIFO")
        config.write_text("")
        command = [sys.executable, socket_server.__file__, str(self.folder), str(self._socket)]
        command += [str(self._program), "--config", str(config), "--standalone"]
        command += ["--storage-path", str(self.folder / "data"), "--cache-size", "256M"]
        with open(log, "ab") as file:
            return subprocess.Popen(
                [*command, "--log-level", "WARNING"], stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def release(self) -> None:
        """Give up the share; the server stops when it was the last one."""
        os.close(self._share)
