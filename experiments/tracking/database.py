"""Which MongoDB a run is recorded in, and the connection to it.

In this order: `-m HOST:PORT:DB`, the URL in L2L_IMPLICIT_MONGO_URL, the URL in the file
~/.config/l2l_implicit/mongo_url (mode 0600), and the embedded server. A URL with a password belongs
in the variable or the file: options are recorded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

import pymongo
from pymongo.database import Database as MongoDatabase
from pymongo.errors import ConfigurationError, ConnectionFailure, OperationFailure
from sacred.observers.mongo import get_pattern, parse_mongo_db_arg

from experiments.tracking.embedded import EmbeddedServer
from experiments.tracking.errors import UserError
from experiments.tracking.values import redacted, secrets_of

URL_VARIABLE, TIMEOUT_VARIABLE = "L2L_IMPLICIT_MONGO_URL", "L2L_IMPLICIT_MONGO_TIMEOUT"
URL_FILE = "~/.config/l2l_implicit/mongo_url"
DEFAULT_NAME = "l2l_implicit"
UNRECORDED = "-u records nothing"
LONGEST = 1e6  # seconds that can be waited for
WRONG_PASSWORD, NOT_ALLOWED, ATLAS = 18, 13, 8000
# OutOfDiskSpace, and a quota that is exceeded; Atlas says 8000 for almost anything.
FULL = (14031, 12501)
Documents: TypeAlias = MongoDatabase[dict[str, Any]]


class Choice(NamedTuple):
    """A database's URL, or None for the embedded server, and where the URL was found."""

    url: str | None
    source: str


def choose(option: str | None = None) -> Choice:
    """The database to use; `option` is the value of Sacred's -m.

    UserError: a malformed option or URL, or a URL file that others can read.
    """
    if option is not None:
        fits = "@" not in option and re.match(get_pattern(), option)
        parts = parse_mongo_db_arg(option) if fits else {"collection": ""}
        if not parts.keys() <= {"url", "db_name"}:  # not shown: it may hold a password
            raise UserError(
                "-m takes HOST:PORT:DB, HOST:PORT or DB, got something else; put a mongodb:// URL,"
                f" or a password, in {URL_VARIABLE} or {URL_FILE}: options are recorded"
            )
        host = parts.get("url", "localhost:27017")
        return Choice(f"mongodb://{host}/{parts.get('db_name', DEFAULT_NAME)}", "-m")
    url, source = os.environ.get(URL_VARIABLE, "").strip(), URL_VARIABLE
    path = Path(os.path.expanduser(URL_FILE))  # which does without a home
    if not url and not os.path.lexists(path):
        return Choice(None, "embedded")
    if not url:
        url, source = _read_private(path), str(path)
    if not url.startswith(("mongodb://", "mongodb+srv://")):
        raise UserError(f"{source} must hold a URL that starts with mongodb:// or mongodb+srv://")
    return Choice(url, source)


def _read_private(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = "" if path.is_fifo() else path.read_text(errors="replace").strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it should hold a mongodb:// URL") from None
    if mode & 0o077:
        raise UserError(f"{path} has mode {mode:04o}: others may read it; run chmod 600 {path}")
    return text


class Database:
    """An open connection; `documents` is the pymongo database.

    `address` is its URL without passwords, `label` the same or `embedded`. UserError: nothing
    answers there, the password is wrong, or the embedded server is missing.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice, self._secrets = choice, secrets_of(choice.url or "")
        self._server = None
        with ExitStack() as resources:
            if choice.url is None:
                self._server = EmbeddedServer()
                resources.callback(self._server.release)
            self.revive()
            limit = max(1, int(1000 * seconds(TIMEOUT_VARIABLE, 5.0)))
            url = f"mongodb://{self._server.host}" if self._server else choice.url
            try:
                self.client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
                    url, serverSelectionTimeoutMS=limit, connectTimeoutMS=limit,
                    socketTimeoutMS=4 * limit, appname="l2l_implicit",
                )  # fmt: skip
                resources.callback(self.client.close)  # before the share in the server
                self.documents: Documents = self.client.get_default_database(DEFAULT_NAME)
                self.documents["runs"].find_one({}, {"_id": 1})  # a ping checks no password
            except Exception as error:  # whatever answers there may answer nonsense
                raise UserError(self.explain(error)) from None
            self.close = resources.pop_all().close
        nodes = self.client.nodes or ()  # of a socket the port is None
        hosts = sorted(quote(h, safe="") if port is None else f"{h}:{port}" for h, port in nodes)
        self.address = f"mongodb://{','.join(hosts)}/{self.documents.name}"
        self.label = self.address if self._server is None else "embedded"

    def redacted(self, value: Any) -> Any:
        """Text, or nested data, without this database's password."""
        return redacted(value, self._secrets)

    def revive(self) -> None:
        """Start the embedded server if it is not up."""
        if self._server is not None:
            self._server.start()

    def explain(self, error: Exception) -> str:
        """One line on what the database refuses, without its password."""
        told = str(error).split(", Timeout:")[0].split(" (config")[0].split(", full error:")[0]
        reason = " ".join(told.split())  # without the driver's description of servers
        source = self._choice.source
        if isinstance(error, OperationFailure):
            text = f"the database of {source} {_refusal(error, reason)}"
        elif isinstance(error, ConnectionFailure):
            text = f"no database answers ({source}): {reason}{_tls(reason)}; {UNRECORDED}"
        elif isinstance(error, (ConfigurationError, ValueError)) and "wire" not in reason:
            text = (
                f"the URL in {source} is not valid: see host, port (at most 65535), database and"
                " options; name and password are percent-encoded, %40 for @ and %2F for /;"
                " mongodb+srv:// asks the DNS for the host"
            )
        else:
            text = f"the database of {source} cannot be used: {reason}"
        return str(self.redacted(text))


def _refusal(error: OperationFailure, reason: str) -> str:
    written = (error.details or {}).get("writeErrors") or [{}]
    code = error.code if error.code is not None else written[0].get("code")
    told = reason.lower()
    if code in FULL or "quota" in told or "disk space" in told:
        return f"is full ({reason}); make room there, or name another; {UNRECORDED}"
    if code == NOT_ALLOWED:
        return f"does not let this user read and write ({reason}); ask for the role readWrite"
    if code == WRONG_PASSWORD or (code == ATLAS and "auth" in told):
        return "refuses the user name or password"
    return f"does not take the run: {reason}; {UNRECORDED}"


def _tls(reason: str) -> str:
    """What the reason may mean: a server does not say that it wants TLS, it hangs up."""
    if "SSL" in reason or "certificate" in reason.lower():
        return "; see tls, tlsCAFile and tlsCertificateKeyFile in the URL"
    hung_up = "connection closed" in reason or "reset by peer" in reason
    return "; if it asks for TLS, the URL needs tls=true" if hung_up else ""


def seconds(variable: str, default: float) -> float:
    """A time limit from the environment; UserError if it is none."""
    text = os.environ.get(variable) or str(default)
    with suppress(ValueError):
        if 0 <= float(text) <= LONGEST:
            return float(text)
    raise UserError(f"{variable} must be a number of seconds, got {text!r}")


@contextmanager
def open_database(option: str | None = None) -> Iterator[Documents]:
    """The pymongo database that runs are recorded in, for reports and tests."""
    with closing(Database(choose(option))) as database:
        yield database.documents
