"""Several runs at once on one embedded database: unique numbers, nobody locked out, no orphan."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from toy_process import finish, journals, run, server_processes, start, wait_for

from experiments.tracking import open_database, socket_server

pytest_plugins = ("toy_process",)


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
