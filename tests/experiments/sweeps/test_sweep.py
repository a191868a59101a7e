"""Sweeps as a user runs them: real processes, real signals, the embedded database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_process import TOY, Place
from toy_process import finish, is_alive, wait_for

from experiments.tracking import open_database, supervisor


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def database(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(place.folder / "data"))
    monkeypatch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    with open_database() as documents:
        yield documents


def complete(database: Any) -> list[str]:
    """The cells of the completed runs, one entry a run."""
    return [run["config"]["cell"] for run in database["runs"].find({"status": "COMPLETED"})]


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True)
    return [int(word) for word in found.stdout.split()]


def test_a_sweep_lists_runs_chooses_retries_and_skips(place: Place, database: Any) -> None:
    code, output = place.run("seeds=1", "--list")
    assert code == 0 and "7 cells: 0 done, 7 to run" in output
    assert not place.started()

    code, output = place.run("seeds=1", "--workers", "2")
    assert code == 1 and "7 cells: 6 done, 0 to run, 1 failed" in output
    assert "tuned: lr=0.2, of validation accuracies 90.0 100.0 100.0" in output
    assert "dying/final/0: killed by SIGKILL; it is tried again" in output
    assert "error: broken/final/0: failed: exit status 1: error: the toy was told to fail" in output
    assert "tuned/final/0: test accuracy 60.0 ± 1.0 %" in output
    # the final run with seed 0 is the very run of the grid: here the stages are equal
    assert len(complete(database)) == len(set(complete(database))) == 5
    assert sorted(place.started().values()) == [1] * 4 + [2] * 2
    (choice,) = database["sweep_choices"].find()
    assert choice["settings"] == [["lr", 0.2]] and choice["index"] == 1

    before = place.started()
    code, output = place.run("seeds=1")
    assert code == 1 and "6 done" in output, "what failed twice is not tried again unasked"
    assert place.started() == before
    assert place.run("--retry-failed", "methods=broken", "seeds=1")[0] == 1
    assert place.started().total() == before.total() + 2


def test_other_code_is_said_and_redone_only_if_asked(place: Place, database: Any) -> None:
    assert "other code" not in place.run("methods=plain", "seeds=1")[1]
    database["fs.files"].update_many({}, {"$set": {"md5": "another file"}})
    code, output = place.run("methods=plain", "seeds=1")
    assert code == 0 and "1 done (1 by other code)" in output and "other code (" in output
    assert place.started().total() == 1
    code, output = place.run("methods=plain", "seeds=1", "--redo-changed")
    assert place.started().total() == 2


def test_a_reader_that_has_seen_enough_is_no_error(place: Place) -> None:
    list_cells = f"{sys.executable} -m experiments.sweep {TOY} folder=. --list"
    code, output = finish(place.popen(["bash", "-c", f"{list_cells} | true; exit $PIPESTATUS"]))
    assert (code, output) == (128 + signal.SIGPIPE, "")


def test_two_sweeps_at_once_never_double_a_cell(place: Place, database: Any) -> None:
    arguments = ("methods=tuned,plain", "pause=0.3", "seeds=2", "--workers", "2")
    both = [finish(process) for process in [place.start(*arguments) for _ in range(2)]]
    assert [code for code, _ in both] == [0, 0], both
    assert len(complete(database)) == 6
    assert set(place.started().values()) == {1}


def test_killed_processes_cost_an_attempt_and_nothing_else(place: Place, database: Any) -> None:
    sweep = place.start("methods=plain", "seeds=1", "hold=True", "--workers", "1")
    (worker,) = wait_for(lambda: children(sweep.pid) if place.training() else [])
    first = place.training()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_alive(first))
    wait_for(lambda: place.started().total() == 2)
    os.kill(sweep.pid, signal.SIGKILL)
    finish(sweep)
    second = place.training()
    wait_for(lambda: not is_alive(second))
    assert not complete(database)

    place.let_end(3)
    code, output = place.run("methods=plain", "seeds=1", "hold=True")
    assert code == 0, output
    assert len(complete(database)) == 1 and place.started().total() == 3
    statuses = [run["status"] for run in database["runs"].find().sort("_id", 1)]
    assert statuses == ["FAILED", "FAILED", "COMPLETED"]


def test_a_sweep_killed_twice_loses_nothing_and_runs_nothing_twice(
    place: Place, database: Any
) -> None:
    arguments = ("methods=plain", "seeds=4", "hold=True", "--workers", "1")
    for number in (1, 2):
        place.let_end(2 * number - 1)
        sweep = place.start(*arguments)
        wait_for(lambda number=number: place.started().total() == 2 * number)
        sweep.kill()
        finish(sweep)
        wait_for(lambda: not is_alive(place.training()))
        done = complete(database)
        assert len(done) == number, "killed while a cell was open"
        assert {place.started()[cell] for cell in done} <= {1, 2}

    place.let_end(100)
    before = place.started()
    done = complete(database)
    code, output = place.run(*arguments)
    assert code == 0 and "4 done" in output, output
    assert sorted(complete(database)) == sorted(set(complete(database)))
    assert len(complete(database)) == 4 and set(done) < set(complete(database))
    assert {cell: place.started()[cell] for cell in done} == {cell: before[cell] for cell in done}
    assert database["runs"].count_documents({}) == place.started().total(), "every start is there"
    assert database["runs"].count_documents({"status": "RUNNING"}) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_gives_its_cells_back(
    place: Place, database: Any, number: signal.Signals
) -> None:
    sweep = place.start("methods=plain", "seeds=2", "hold=True", "--workers", "2")
    wait_for(lambda: place.started().total() == 2)
    wait_for(lambda: database["runs"].count_documents({"status": "RUNNING"}) == 2)
    sweep.send_signal(number)
    code, output = finish(sweep)
    assert code == 128 + number and f"stopped by {number.name}; the same command" in output
    assert database["runs"].distinct("status") == ["INTERRUPTED"]
    cells = list(database["sweep_cells"].find())
    assert [(cell["state"], cell["failures"]) for cell in cells] == [("free", [])] * 2
    assert not list((place.folder / "data" / "sweeps").iterdir())


def test_a_worker_that_has_lost_its_claim_stops_its_training(place: Place, database: Any) -> None:
    sweep = place.start("methods=plain", "seeds=1", "hold=True", "--workers", "1")
    wait_for(lambda: database["runs"].count_documents({"status": "RUNNING"}) == 1)
    taken = {"token": "another", "host": "elsewhere"}
    database["sweep_cells"].update_one({}, {"$set": taken})
    wait_for(lambda: database["runs"].distinct("status") == ["INTERRUPTED"])
    (cell,) = database["sweep_cells"].find()
    assert (cell["token"], cell["state"], cell["failures"]) == ("another", "claimed", [])
    sweep.terminate()
    assert finish(sweep)[0] == 128 + signal.SIGTERM
    assert place.started().total() == 1


def test_a_database_that_goes_away_costs_nothing(place: Place, database: Any) -> None:
    sweep = place.start("methods=plain", "seeds=2", "hold=True", "--workers", "1")
    wait_for(place.training)
    server = supervisor.read_server_file(place.folder / "data" / "mongodb")["server"]
    os.kill(server, signal.SIGKILL)
    place.let_end(2)
    code, output = finish(sweep)
    assert code == 0, output
    assert len(complete(database)) == 2 and set(place.started().values()) == {1}


def test_printed_lines_run_their_own_cell_in_any_order(place: Place, database: Any) -> None:
    code, output = place.run("methods=tuned", "seeds=2", "pause=0.3", "--print")
    lines = output.splitlines()
    assert code == 0 and len(lines) == 5
    assert lines[-1].startswith("python -m experiments.sweep ")
    python = Path(sys.executable).parent
    place.env["PATH"] = f"{python}:{place.env['PATH']}"
    # a final run's line first: it runs the grid it needs; each line twice, all at once
    commands = [lines[-1], lines[-2], lines[0], lines[0], lines[-1]]
    ended = [finish(p) for p in [place.popen(line, shell=True) for line in commands]]
    assert [code for code, _ in ended] == [0] * 5, ended
    assert len(complete(database)) == 4 and set(place.started().values()) == {1}


def test_the_real_training(place: Place, database: Any) -> None:
    code, output = place.run("seeds=1", sweep="smoke")
    assert code == 0 and "test accuracy" in output, output
    assert len(complete(database)) == 1
    assert "1 cells: 1 done, 0 to run" in place.run("seeds=1", "--list", sweep="smoke")[1]


def test_a_dry_run_names_the_setting_that_is_refused(place: Place) -> None:
    code, output = place.run("methods=plain", "some.lr=3", "--dry-run")
    assert code == 1 and "plain/final/0: error: no configuration entry 'some" in output, output
    assert not place.started()
    assert place.run("methods=plain", "--dry-run") == (0, "plain/final/0: fine\n")
