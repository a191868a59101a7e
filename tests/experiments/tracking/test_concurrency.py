"""Several runs at once on one embedded database: unique numbers, nobody locked out, no orphan."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from toy_process import finish, run, server_process, server_processes, start, wait_for

from experiments.tracking import open_database, socket_server

pytest_plugins = ("toy_process",)
TRAIN = {"name": "train/loss"}


def assert_complete(data: Path, metric: str, points: list[int]) -> None:
    """Runs 1, 2, ... with these numbers of points; then the server stops."""
    with open_database() as database:
        runs = list(database["runs"].find().sort("_id", 1))
        assert [run["_id"] for run in runs] == list(range(1, len(points) + 1))
        assert {run["status"] for run in runs} == {"COMPLETED"}
        found = [len(m["steps"]) for m in database["metrics"].find({"name": metric})]
        assert sorted(found) == points
    assert not list((data / "journals").glob("*"))
    wait_for(lambda: not server_processes(data))
    time.sleep(0.5)
    assert not server_processes(data)


@pytest.mark.slow
def test_eight_runs_at_once(data: Path) -> None:
    words, options = ("with", "smoke", "iterations=6"), {"module": "experiments.train"}
    processes = [start(data, *words, f"seed={seed}", folder=data.parent, **options)
                 for seed in range(8)]  # fmt: skip
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0] * 8, ended
    assert_complete(data, "train/query_loss", [6] * 8)


def test_three_runs_at_once_and_one_while_another_ends(data: Path) -> None:
    """The toy, for time; two wait at their middle until one has ended and the fourth begun."""
    gate = data.parent / "gate"
    more = [("steps=3",), ("steps=12", f"hold={gate}"), ("steps=8", f"hold={gate}")]
    first = [start(data, "-b", "0.2", "with", *settings) for settings in more]
    assert finish(first[0])[0] == 0
    late = start(data, "with", "steps=5")  # while the first's share is given up
    gate.touch()
    for process in (*first[1:], late):
        code, output = finish(process)
        assert code == 0, output
    assert_complete(data, "train/loss", [3, 5, 8, 12])


@pytest.mark.slow
def test_a_run_that_starts_in_the_servers_last_moments(data: Path) -> None:
    """The server waits `LINGER` seconds for the next run, then stops; starts fall around it."""
    for pause in (socket_server.LINGER - 0.3, socket_server.LINGER, socket_server.LINGER + 0.2):
        code, output = run(data, "with", "steps=1")
        assert code == 0, output
        time.sleep(pause)
    with open_database() as database:
        assert database["runs"].distinct("_id") == [1, 2, 3]


@pytest.mark.slow
def test_a_crash_of_everything_loses_the_last_seconds_at_most(data: Path) -> None:
    """SIGKILL to the run and its server, both at once."""
    process = start(data, "-b", "0.2", "with", "steps=100000", "pause=0.02")

    def recorded() -> int:
        with open_database() as database:
            loss = database["metrics"].find_one({"run_id": 1, **TRAIN})
            return len(loss["steps"]) if loss else 0

    wait_for(lambda: recorded() > 20)
    seen = recorded()
    for victim in (process.pid, server_process(data)):
        os.kill(victim, signal.SIGKILL)
    finish(process)
    assert recorded() >= seen  # on the disk: the database starts again from it
    code, output = run(data, "with", "quick")
    assert code == 0 and "Uploaded the record that run 1 left" in output
    assert recorded() >= seen
