"""Which MongoDB a run is recorded in, and the connection to it.

In this order: `-m HOST:PORT:DB`, the URL in L2L_IMPLICIT_MONGO_URL, the URL in the file
~/.config/l2l_implicit/mongo_url (L2L_IMPLICIT_MONGO_URL_FILE names another; mode 0600), and the
embedded server. A URL with a password belongs in the variable or the file: options are recorded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pymongo
from pymongo.database import Database as MongoDatabase
from pymongo.errors import PyMongoError
from sacred.observers.mongo import get_pattern, parse_mongo_db_arg

from experiments.tracking.embedded import EmbeddedServer
from experiments.tracking.errors import UserError
from experiments.tracking.redact import Redactor, secrets_of
from experiments.tracking.refusals import explain

URL_VARIABLE = "L2L_IMPLICIT_MONGO_URL"
FILE_VARIABLE = "L2L_IMPLICIT_MONGO_URL_FILE"
TIMEOUT_VARIABLE = "L2L_IMPLICIT_MONGO_TIMEOUT"
DEFAULT_FILE = "~/.config/l2l_implicit/mongo_url"
DEFAULT_NAME = "l2l_implicit"
SCHEMES = ("mongodb://", "mongodb+srv://")

Documents: TypeAlias = MongoDatabase[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A database's URL, or None for the embedded server, and where the URL was found."""

    url: str | None
    source: str


def choose(option: str | None = None) -> Choice:
    """The database to use; `option` is the value of Sacred's -m.

    Raises:
        UserError: a malformed option or URL, or a URL file that others can read.
    """
    if option is not None:
        return Choice(_url_of_option(option), "-m")
    if url := os.environ.get(URL_VARIABLE, "").strip():
        return Choice(_checked(url, URL_VARIABLE), URL_VARIABLE)
    path = Path(os.environ.get(FILE_VARIABLE) or DEFAULT_FILE).expanduser()
    if os.environ.get(FILE_VARIABLE) or path.exists():
        return Choice(_checked(_read_private(path), str(path)), str(path))
    return Choice(None, "embedded")


def _url_of_option(option: str) -> str:
    if "://" in option:
        raise UserError(
            f"-m takes HOST:PORT:DB; put a mongodb:// URL in {URL_VARIABLE} or {DEFAULT_FILE},"
            " since options are recorded with the run"
        )
    parts = parse_mongo_db_arg(option) if _is_option(option) else {"collection": ""}
    if not parts.keys() <= {"url", "db_name"}:
        raise UserError(f"-m takes HOST:PORT:DB, HOST:PORT or DB, got {option!r}")
    host = parts.get("url", "localhost:27017")
    return f"mongodb://{host}/{parts.get('db_name', DEFAULT_NAME)}"


def _is_option(option: str) -> bool:
    return re.match(get_pattern(), option) is not None


def _checked(url: str, source: str) -> str:
    if not url.startswith(SCHEMES):
        raise UserError(f"{source} must hold a URL that starts with mongodb:// or mongodb+srv://")
    return url


def _read_private(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text().strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it should hold a mongodb:// URL") from None
    if mode & 0o077:
        raise UserError(f"{path} has mode {mode:04o}: others may read it; run chmod 600 {path}")
    return text


class Database:
    """An open connection; `documents` is the pymongo database.

    Args:
        choice: what `choose` returned.

    Attributes:
        label: the database's address without passwords, or `embedded`.
        redactor: hides this database's password.

    Raises:
        UserError: nothing answers at the address, the password is wrong, or the embedded
            server is missing.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self.redactor = Redactor(secrets_of(choice.url or ""))
        self._server = EmbeddedServer() if choice.url is None else None
        try:
            self.client, self.documents = self._connect()
        except BaseException:
            self._release()
            raise
        self.label = self._label()

    def _connect(self) -> tuple[pymongo.MongoClient[dict[str, Any]], Documents]:
        self._port = self._server.port() if self._server is not None else 0
        url = self._choice.url or f"mongodb://127.0.0.1:{self._port}/{DEFAULT_NAME}"
        client: pymongo.MongoClient[dict[str, Any]] | None = None
        try:
            client = _client(url)
            documents: Documents = client.get_default_database(DEFAULT_NAME)
            documents["runs"].find_one({}, {"_id": 1})  # a ping would not check the password
        except (PyMongoError, ValueError, OSError) as error:
            if client is not None:
                client.close()
            raise UserError(self.explain(error)) from None
        return client, documents

    def explain(self, error: Exception) -> str:
        """One line on what the database refuses, without its password."""
        return self.redactor.text(explain(error, self._choice.source))

    def _label(self) -> str:
        if self._server is not None:
            return "embedded"
        hosts = sorted(f"{host}:{port}" for host, port in self.client.nodes or ())
        return f"mongodb://{','.join(hosts)}/{self.documents.name}"

    def revive(self) -> None:
        """After a failure: start the embedded server again if its supervisor has died too."""
        if self._server is not None and self._server.port() != self._port:
            self.client.close()
            self.client, self.documents = self._connect()

    def close(self) -> None:
        """Close the client, then give up the share in the embedded server, in this order."""
        self.client.close()
        self._release()

    def _release(self) -> None:
        if self._server is not None:
            self._server.release()


def _client(url: str) -> pymongo.MongoClient[dict[str, Any]]:
    timeout = int(1000 * float(os.environ.get(TIMEOUT_VARIABLE) or 5))
    return pymongo.MongoClient(
        url,
        serverSelectionTimeoutMS=timeout,
        connectTimeoutMS=timeout,
        socketTimeoutMS=4 * timeout,
        appname="l2l_implicit",
    )


@contextmanager
def open_database(option: str | None = None) -> Iterator[Documents]:
    """The pymongo database that runs are recorded in, for reports and tests.

    Example:
        >>> with open_database() as database:  # doctest: +SKIP
        ...     database["runs"].count_documents({"status": "COMPLETED"})
    """
    database = Database(choose(option))
    try:
        yield database.documents
    finally:
        database.close()
