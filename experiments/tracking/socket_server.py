"""Run a server's program so that it listens on a Unix socket, whatever address it is given.

    python socket_server.py SOCKET PROGRAM ARGUMENTS...

A port of the loopback interface is open to every user of the machine; a socket in a folder that
only its owner can enter is not, and whoever answers on it is the owner's. The program can open
nothing else: every socket it makes is this one. It ends when its standard input does.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import threading
from typing import Any

PATH = sys.argv[1]


class OneSocket(socket.socket):
    """A Unix socket at `PATH`, for a program that was written for TCP."""

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1,
                 fileno: int | None = None) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno)

    def bind(self, address: Any) -> None:
        """Bind `PATH`, whatever the address."""
        super().bind(PATH)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, from an address like TCP's."""
        return super().accept()[0], ("owner", 0)

    def getsockname(self) -> Any:
        """An address like TCP's."""
        return PATH, 0


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    socket.socket = OneSocket  # type: ignore[misc]
    threading.Thread(target=_end_with_input, daemon=True).start()
    sys.argv = sys.argv[2:]
    sys.path = [folder for folder in sys.path if folder != os.path.dirname(__file__)]
    runpy.run_path(sys.argv[0], run_name="__main__")
