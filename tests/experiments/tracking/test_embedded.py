"""The embedded server is its owner's alone, is shared by several runs at once, and is found
whatever happens to its files."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest
from pytest import MonkeyPatch
from toy_process import (
    connected,
    finish,
    journals,
    run,
    served,
    server_process,
    server_processes,
    start,
    wait_for,
)

from experiments.tracking import UserError, open_database, socket_server
from experiments.tracking.embedded import data_folder

pytest_plugins = ("toy_process",)
MINE = {"_id": 1, "mine": True}


@pytest.fixture
def address(data: Path) -> Iterator[str]:
    """Of the server, which is up; it holds one document."""
    with served(data) as printed, open_database() as database:
        database["runs"].insert_one(MINE)
        yield printed


def test_no_port_is_open_and_only_the_owner_reaches_the_socket(data: Path, address: str) -> None:
    server = psutil.Process(server_process(data))
    assert not server.net_connections("inet") and server.net_connections("unix")
    ((path, port),) = pymongo.uri_parser.parse_uri(address)["nodelist"]
    assert port is None and stat.S_ISSOCK(os.stat(path).st_mode)
    for private in (data / "mongodb", data / "mongodb" / "data", Path(path)):
        assert private.stat().st_mode & 0o077 == 0, private
    with connected(address) as database:
        assert database["runs"].find_one() == MINE


def test_a_data_folder_is_its_users_alone(data: Path, monkeypatch: MonkeyPatch) -> None:
    (data / "mongodb").mkdir(parents=True, mode=0o777)
    assert data_folder("mongodb").stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(UserError, match="of your own: it belongs to somebody else"):
            data_folder("mongodb")
    (data / "linked").symlink_to(data / "mongodb")
    assert data_folder("linked").is_dir()
    if os.geteuid() == 0:  # who alone can make such a link here; in /tmp everybody can
        os.lchown(data / "linked", 12345, -1)
        with pytest.raises(UserError, match="of your own: it belongs to somebody else"):
            data_folder("linked")
    for root, reason in (("/dev/null/x", "Not a directory"), ("~no-one-is-so-called/x", "a home"),
                         ("/tmp/\udcff", r"in UTF-8, got '/tmp/\\udcff'")):  # fmt: skip
        monkeypatch.setenv("L2L_IMPLICIT_DATA", root)
        with pytest.raises(UserError, match=f"{reason}.*; L2L_IMPLICIT_DATA names another"):
            data_folder("mongodb")
    (data / "gone").mkdir()
    monkeypatch.chdir(data / "gone")
    (data / "gone").rmdir()
    monkeypatch.setenv("L2L_IMPLICIT_DATA", "here")
    with pytest.raises(UserError, match="a current folder that is there.*, got 'here'; L2L"):
        data_folder("mongodb")
    monkeypatch.chdir(data)  # what is undone leads nowhere from a folder that is gone


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_a_socket_that_is_gone_is_made_again(address: str, instead: str) -> None:
    """Of a server that is up; its clients come back, too."""
    ((path, _),) = pymongo.uri_parser.parse_uri(address)["nodelist"]
    with connected(address) as before:
        assert before["runs"].find_one() == MINE
        Path(path).unlink()
        if instead == "a file":
            Path(path).write_text("[]")
        with open_database() as database:
            assert database["runs"].find_one() == before["runs"].find_one() == MINE


def test_nonsense_in_every_file_of_the_folder(data: Path) -> None:
    with open_database() as database:
        database["runs"].insert_one(MINE)
    folder = data / "mongodb"
    wait_for(lambda: not server_processes(data))
    for path in [p for p in folder.iterdir() if not p.is_dir()] + [folder / "server.json"]:
        path.unlink(missing_ok=True)
        path.write_bytes(b"[]\0" * 99)
    with open_database() as database:
        assert database["runs"].find_one() == MINE


@pytest.mark.parametrize(("name", "make"), [
    ("clients.lock", os.mkdir), ("empty.toml", os.mkdir), ("server.log", os.mkfifo),
])  # fmt: skip
def test_another_thing_in_place_of_a_file_is_one_line(data: Path, name: str, make: Any) -> None:
    make(data_folder("mongodb") / name)
    with pytest.raises(UserError, match=f"cannot use its folder: .*{name}"), open_database():
        pass


def test_a_name_too_long_for_a_socket(tmp_path: Path, monkeypatch: MonkeyPatch, data: Path) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / ("long" * 30)))
    for known in (0, 1):
        with open_database() as database:
            assert database["runs"].count_documents({}) == known
            database["runs"].replace_one(MINE, MINE, upsert=True)
            ((path, port),) = database.client.nodes
            found = os.stat(os.path.dirname(path))
            assert port is None and found.st_mode & 0o777 == 0o700 and found.st_uid == os.geteuid()


def test_three_runs_at_once_and_one_while_another_ends(data: Path) -> None:
    """Two wait at their middle until one has ended and the fourth begun."""
    gate = data.parent / "gate"
    more = [("steps=3",), ("steps=12", f"hold={gate}"), ("steps=8", f"hold={gate}")]
    first = [start(data, "-b", "0.2", "with", *settings) for settings in more]
    assert finish(first[0])[0] == 0
    late = start(data, "with", "steps=5")  # while the first's share is given up
    gate.touch()
    for process in (*first[1:], late):
        code, output = finish(process)
        assert code == 0, output
    with open_database() as database:
        runs = list(database["runs"].find().sort("_id", 1))
        assert [(run["_id"], run["status"]) for run in runs] == [
            (number, "COMPLETED") for number in range(1, 5)
        ]
        found = [len(m["steps"]) for m in database["metrics"].find({"name": "train/loss"})]
        assert sorted(found) == [3, 5, 8, 12]
    assert not journals(data)
    wait_for(lambda: not server_processes(data))
    time.sleep(0.5)
    assert not server_processes(data)


@pytest.mark.slow
def test_a_run_that_starts_in_the_servers_last_moments(data: Path) -> None:
    """The server waits `LINGER` seconds for the next run, then stops; starts fall around it."""
    for pause in (socket_server.LINGER - 0.3, socket_server.LINGER, socket_server.LINGER + 0.2):
        code, output = run(data, "with", "steps=1")
        assert code == 0, output
        time.sleep(pause)
    with open_database() as database:
        assert database["runs"].distinct("_id") == [1, 2, 3]
