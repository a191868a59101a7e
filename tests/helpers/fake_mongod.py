"""A server that speaks MongoDB's wire protocol and refuses what a test wants refused."""

from __future__ import annotations

import socketserver
import struct
import threading
from typing import Any

import bson

HELLO = {
    "ok": 1, "ismaster": True, "isWritablePrimary": True, "helloOk": True, "maxWireVersion": 21,
    "minWireVersion": 0, "maxBsonObjectSize": 16 * 2**20, "maxMessageSizeBytes": 48_000_000,
    "maxWriteBatchSize": 100_000, "logicalSessionTimeoutMinutes": 30,
}  # fmt: skip
QUERY, REPLY, MSG = 2004, 1, 2013
Document = dict[str, Any]


class _Handler(socketserver.StreamRequestHandler):
    server: FakeMongod

    def handle(self) -> None:
        while not self.server.hangs_up and len(head := self.rfile.read(16)) == 16:
            size, request, _, opcode = struct.unpack("<4i", head)
            body = self.rfile.read(size - 16)
            # behind the collection's name, or before its payload (kind 1)
            start = body.index(b"\0", 4) + 9 if opcode == QUERY else 5
            assert opcode == QUERY or body[4] == 0
            asked = bson.decode(body[start : start + struct.unpack_from("<i", body, start)[0]])
            answer = bson.encode(self.server.answer(asked))
            if opcode == QUERY:
                kind, payload = REPLY, struct.pack("<iqii", 8, 0, 0, 1) + answer
            else:
                kind, payload = MSG, struct.pack("<Ib", 0, 0) + answer
            self.wfile.write(struct.pack("<4i", 16 + len(payload), 1, request, kind) + payload)


class FakeMongod(socketserver.ThreadingTCPServer):
    """Listens on a free port of the loopback interface while its ``with`` block lasts.

    ``refused`` has the answer to each of these commands, by name; others succeed with nothing
    found. It can hang up, as a server does that wants TLS. `seen` are the commands that came.
    """

    daemon_threads = True

    def __init__(self, refused: dict[str, Document] | None = None, hangs_up: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hangs_up, self._refused = hangs_up, refused or {}
        self.seen: list[str] = []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, asked: Document) -> Document:
        """The answer to a command, which is a document's first key."""
        name = next(iter(asked))
        self.seen.append(name)
        if name in self._refused:
            return self._refused[name]
        if name.lower() in ("hello", "ismaster"):
            return HELLO
        if name in ("find", "listIndexes", "aggregate"):
            return {"ok": 1, "cursor": {"id": 0, "ns": "x.y", "firstBatch": []}}
        return {"ok": 1, "n": 1}


def refusal(code: int, name: str, message: str) -> Document:
    """The answer to a command that fails."""
    return {"ok": 0, "code": code, "codeName": name, "errmsg": message}
