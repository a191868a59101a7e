"""The embedded server is its owner's alone, and is found whatever happens to its files."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from toy_process import connected, environment, finish, server_process, start, wait_for

from experiments.tracking import UserError, open_database
from experiments.tracking.embedded import data_folder

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    for name in ("L2L_IMPLICIT_MONGO_URL", "L2L_IMPLICIT_MONGO_URL_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "data"


@pytest.fixture
def served(data: Path) -> Iterator[str]:
    """The address that the documented command prints, while it is up."""
    process = start(environment(data), module="experiments.tracking.serve")
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    assert finish(process)[0] == 0


def sockets(process: int) -> set[str]:
    """The inodes of a process's sockets."""
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()]
    return {link.removeprefix("socket:[").rstrip("]") for link in links if "socket" in link}


@linux
def test_no_port_is_open(data: Path, served: str) -> None:
    mine = sockets(server_process(data))
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6", "udp", "udp6")]
    bound = {line.split()[9] for text in tables for line in text.splitlines()[1:]}
    unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    assert mine and not mine & bound and mine & unix


def test_only_the_owner_reaches_the_socket(data: Path, served: str) -> None:
    ((path, port),) = pymongo.uri_parser.parse_uri(served)["nodelist"]
    assert port is None and stat.S_ISSOCK(os.stat(path).st_mode)
    for private in (data / "mongodb", data / "mongodb" / "data", Path(path)):
        assert private.stat().st_mode & 0o077 == 0, private
    with connected(served) as database, open_database() as own:
        own["runs"].insert_one({"_id": 1, "mine": True})
        assert database["runs"].find_one() == {"_id": 1, "mine": True}


def test_a_data_folder_is_its_users_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "mongodb").mkdir(parents=True, mode=0o777)
    assert data_folder("mongodb").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="of your own: it belongs to somebody else"):
        data_folder("mongodb")
    monkeypatch.undo()
    monkeypatch.setenv("L2L_IMPLICIT_DATA", "/dev/null/x")
    with pytest.raises(UserError, match="Not a directory; L2L_IMPLICIT_DATA names another"):
        data_folder("mongodb")


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_a_socket_that_is_gone_is_made_again(data: Path, served: str, instead: str) -> None:
    """Of a server that is up; its clients come back, too."""
    ((path, _),) = pymongo.uri_parser.parse_uri(served)["nodelist"]
    with connected(served) as before:
        before["runs"].insert_one({"_id": 1, "mine": True})
        Path(path).unlink()
        if instead == "a file":
            Path(path).write_text("[]")
        with open_database() as database:
            assert database["runs"].find_one() == {"_id": 1, "mine": True}
            assert before["runs"].find_one() == {"_id": 1, "mine": True}


def test_nonsense_in_every_file_of_the_folder(data: Path) -> None:
    with open_database() as database:
        database["runs"].insert_one({"_id": 1, "mine": True})
    folder = data / "mongodb"
    wait_for(lambda: not server_is_up(folder))
    for path in [p for p in folder.iterdir() if not p.is_dir()] + [folder / "server.json"]:
        path.unlink(missing_ok=True)
        path.write_bytes(b"[]\0" * 99)
    with open_database() as database:
        assert database["runs"].find_one() == {"_id": 1, "mine": True}


def server_is_up(folder: Path) -> bool:
    """Whether it holds its lock."""
    with open(folder / "server.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_folder_whose_name_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / ("long" * 30)))
    with open_database() as database:
        database["runs"].insert_one({"_id": 1})
        (path, port) = next(iter(database.client.nodes))
        found: Any = os.stat(os.path.dirname(path))
        assert port is None and found.st_mode & 0o777 == 0o700 and found.st_uid == os.geteuid()
    with open_database() as database:
        assert database["runs"].find_one() == {"_id": 1}
