"""A database server of one's own, to be killed and started again at one address."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pymongo

EXECUTABLE = Path(sys.executable).with_name("secantusd-py")
PATIENCE = 20_000  # milliseconds for the server to answer


class Server:
    """SecantusDB on loopback.

    Args:
        folder: of its data, made if it is not there.
        port: free.
        options: further ones of its command line.

    Attributes:
        address: host and port.
    """

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.address = f"127.0.0.1:{port}"
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "empty.toml").write_text("")  # keeps a stray secantusd.toml from being read
        self._command = [str(EXECUTABLE), "--config", "empty.toml", "--host", "127.0.0.1"]
        self._command += ["--port", str(port), "--storage-path", "data", "--standalone", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client: Any = pymongo.MongoClient(self.address, serverSelectionTimeoutMS=PATIENCE)
        client.admin.command("ping")
        client.close()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
