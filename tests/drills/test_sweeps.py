"""Sweeps of which something dies: workers, schedulers, the sweep, a training, the database."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import train_process
from distributed import Client
from distributed.comm import connect
from docs_blocks import blocks
from sweep_process import QUIET, Place, complete, parent
from toy_process import ROOT, finish, free_port, is_alive, read_until, server_process, wait_for

pytest_plugins = ("sweep_process",)
pytestmark = pytest.mark.slow

RESUMED = """
from experiments.sweeps.definition import Benchmark, Method, Sweep
SMALL = {"tasks.level": "easy", "model.hidden": 8, "meta_batch": 2, "validation_tasks": 4,
         "test_tasks": 8, "iterations": 16, "validate_every": 8}
SWEEP = Sweep({"default": Method(("glyphs",), settings=SMALL)}, {"glyphs": Benchmark()}, seeds=1,
              module="train_process")
"""
"""A sweep of one real training, to which `train_process` lets something happen."""

# Pickled by value: a scheduler cannot import this file.
WANTED = eval(
    "lambda dask_scheduler: [len(task.who_wants) for task in dask_scheduler.tasks.values()]",
    {"__name__": "__main__"},
)
"""How many clients want each cell."""


def statuses(recorded: Any) -> list[str]:
    return [run["status"] for run in recorded["runs"].find().sort("_id", 1)]


def held(place: Place, recorded: Any, number: int) -> None:
    """Wait for trainings that have a RUNNING record, so that a signal is recorded."""
    wait_for(lambda: place.started().total() == number)
    wait_for(lambda: recorded["runs"].count_documents({"status": "RUNNING"}) > 0)


def test_a_worker_killed_in_mid_cell(place: Place, recorded: Any) -> None:
    sweep = place.start("methods=plain", "seeds=1", "hold=True", "--workers", "1")
    held(place, recorded, 1)
    first = place.training()
    worker = parent(first)
    assert parent(worker) == sweep.pid
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_alive(first))
    wait_for(lambda: place.started().total() == 2)
    assert not complete(recorded)
    place.let_end(2)
    code, output = finish(sweep)
    assert code == 0 and "Traceback" not in output and "distributed" not in output, output
    assert statuses(recorded) == ["FAILED", "COMPLETED"]


def test_a_worker_killed_again_and_again_is_given_up(place: Place, recorded: Any) -> None:
    """Dask's own limit: three deaths are forgiven; nothing is chosen, and it is said."""
    sweep = place.start("methods=tuned", "seeds=1", "hold=True", "--workers", "1")
    place.let_end(2)  # two settings of the grid complete, the third takes its worker with it
    seen = 2
    while sweep.poll() is None:
        if place.started().total() > seen:
            seen += 1
            worker = parent(place.training())
            if worker > 1:
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    code, output = finish(sweep)
    assert code == 1 and "Traceback" not in output, output
    assert "tuned/grid/2: interrupted: its worker died" in output
    assert "tuned/final/0: pending: nothing is chosen before its whole grid" in output
    assert len(complete(recorded)) == 2
    place.let_end(100)
    code, output = place.run("methods=tuned", "seeds=1", "hold=True")
    assert code == 0 and "tuned: lr=0.2, of validation accuracies 90.0 100.0 100.0" in output
    assert len(complete(recorded)) == len(set(complete(recorded))) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGXCPU])
def test_a_death_from_outside_is_no_failure(place: Place, recorded: Any, number: Any) -> None:
    """The better setting dies twice in one call: nothing is chosen until it has completed."""
    sweep = place.start("methods=tuned", "seeds=1", "hold=True", "--workers", "1")
    place.let_end(1)
    for started in (2, 3):
        held(place, recorded, started)
        wait_for(lambda: statuses(recorded)[-1] == "RUNNING")
        os.kill(place.training(), number)
        wait_for(lambda: statuses(recorded)[-1] != "RUNNING" or sweep.poll() is not None)
    place.let_end(4)
    code, output = finish(sweep)
    assert code == 1 and f"tuned/grid/1: interrupted: killed by {number.name}" in output, output
    assert "tuned/final/0: pending: nothing is chosen before its whole grid" in output
    assert "missing: tuned/grid/1" in output and len(complete(recorded)) == 2
    place.let_end(100)
    code, output = place.run("methods=tuned", "seeds=1", "hold=True")
    assert code == 0 and "tuned: lr=0.2, of" in output, output


def test_a_killed_sweep_goes_on_from_the_checkpoint(place: Place, recorded: Any) -> None:
    """The training stops itself after its checkpoint, and is killed with the sweep."""
    (place.folder / "resumed.py").write_text(RESUMED)
    place.env |= train_process.environment(signal=[12, signal.SIGSTOP], checkpoint=8)
    sweep = place.start("--workers", "1", sweep="resumed.py")
    folder = wait_for(lambda: list(place.folder.glob("runs/*/checkpoint.pt")))[0].parent
    wait_for(lambda: statuses(recorded) == ["RUNNING"])
    (training,) = wait_for(lambda: [child.pid for child in psutil.Process(sweep.pid).children(True)
                                    if child.status() == psutil.STATUS_STOPPED])  # fmt: skip
    sweep.kill()
    finish(sweep)
    wait_for(lambda: not is_alive(training))
    place.env |= train_process.environment()
    code, output = place.run("--workers", "1", sweep="resumed.py")
    assert code == 0, output
    assert statuses(recorded) == ["INTERRUPTED", "COMPLETED"]
    assert recorded["runs"].find_one({"_id": 2})["info"]["resumes"] == folder.name
    assert place.run(sweep="resumed.py")[0] == 0
    assert len(statuses(recorded)) == 2, "nothing finished runs twice"
    assert recorded["sweep_locks"].distinct("_id") == ["database"]


@pytest.mark.usefixtures("not_by_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_sweep_brings_its_trainings_home(
    place: Place, recorded: Any, number: signal.Signals
) -> None:
    """As from a terminal or a batch system: every process of the sweep's group gets the signal."""
    sweep = place.start("methods=plain", "seeds=2", "hold=True", "--workers", "2",
                        start_new_session=True)  # fmt: skip
    held(place, recorded, 2)
    wait_for(lambda: statuses(recorded) == ["RUNNING"] * 2)
    os.killpg(sweep.pid, number)
    code, output = finish(sweep)
    assert code == 128 + number and f"stopped by {number.name}; the same command" in output, output
    assert "Traceback" not in output
    assert statuses(recorded) == ["INTERRUPTED"] * 2
    assert recorded["sweep_locks"].distinct("_id") == ["database"]
    assert "2 interrupted" in place.run("methods=plain", "seeds=2", "hold=True", "--list")[1]


async def greeted(address: str) -> None:
    """Dask's own handshake, which comes before every order."""
    comm = await asyncio.wait_for(connect(address, timeout=5), 30)
    await comm.close()


def test_nobody_else_on_this_machine_gives_orders(place: Place, recorded: Any) -> None:
    """Dask runs whatever it is sent: every port of a sweep of one's own wants its keys."""
    sweep = place.start("methods=plain", "seeds=1", "hold=True", "--workers", "1")
    held(place, recorded, 1)
    own = psutil.Process(sweep.pid)
    listening = {
        connection.laddr.port
        for process in [own, *own.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) >= 3, "the scheduler, its dashboard, a worker"
    for port in listening:
        with pytest.raises((OSError, asyncio.TimeoutError)):
            asyncio.run(greeted(f"tcp://127.0.0.1:{port}"))
    asyncio.run(greeted(place.scheduler()[1]))  # as one without keys would answer
    place.let_end(1)
    assert finish(sweep)[0] == 0


def test_two_clients_on_one_scheduler(place: Place, recorded: Any) -> None:
    _, address = place.scheduler()
    for _ in range(2):
        place.worker(address)
    words = ("methods=tuned,plain", "pause=0.3", "seeds=2", "--scheduler", address)
    both = [finish(process) for process in [place.start(*words) for _ in range(2)]]
    assert [code for code, _ in both] == [0, 0], both
    assert all("7 completed" in output and "Traceback" not in output for _, output in both), both
    # one final run is the very run of the grid
    assert len(complete(recorded)) == len(set(complete(recorded))) == 6
    assert set(place.started().values()) == {1}


def test_a_killed_client_leaves_its_cells_to_the_other(place: Place, recorded: Any) -> None:
    _, address = place.scheduler()
    place.worker(address)
    words = ("methods=plain", "seeds=2", "hold=True", "--scheduler", address)
    first = place.start(*words)
    held(place, recorded, 1)
    second = place.start(*words)
    with Client(address) as client:
        wait_for(lambda: client.run_on_scheduler(WANTED) == [2, 2])
    first.kill()
    finish(first)
    place.let_end(1)
    held(place, recorded, 2)
    wait_for(lambda: statuses(recorded) == ["COMPLETED", "RUNNING"])
    second.kill()
    wait_for(lambda: statuses(recorded) == ["COMPLETED", "INTERRUPTED"])
    wait_for(lambda: not is_alive(place.training()))


def test_the_scheduler_goes(place: Place, recorded: Any) -> None:
    scheduler, address = place.scheduler()
    place.worker(address)
    words = ("methods=plain", "seeds=3", "hold=True", "--scheduler")
    place.let_end(1)
    sweep = place.start(*words, address)
    held(place, recorded, 2)
    scheduler.kill()
    code, output = finish(sweep)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, output
    assert f"the scheduler at {address} has gone" in errors[0]
    assert "Traceback" not in output and "distributed" not in output, output
    wait_for(lambda: not is_alive(place.training()))
    _, address = place.scheduler("another")
    place.worker(address)
    place.let_end(100)
    code, output = place.run(*words, address)
    assert code == 0 and "3 completed" in output, output
    assert len(complete(recorded)) == len(set(complete(recorded))) == 3
    assert place.started().total() == 4 == len(statuses(recorded))


def test_twelve_cells_on_two_schedulers_of_one_database(place: Place, recorded: Any) -> None:
    """Neither waits for the other while there is something else to do, and none runs twice."""
    addresses = [place.scheduler(name)[1] for name in ("one", "two")]
    for address in addresses:
        place.worker(address)
    words = ("methods=plain", "seeds=12", "pause=0.5", "--scheduler")
    both = [finish(process) for process in [place.start(*words, a) for a in addresses]]
    assert [code for code, _ in both] == [0, 0], both
    assert all("12 cells: 12 completed" in output for _, output in both), both
    assert len(complete(recorded)) == len(set(complete(recorded))) == 12
    assert set(place.started().values()) == {1}
    assert len({worker for _, _, worker in place.trainings()}) == 2, "both have worked"


def test_a_worker_of_another_database_is_told(place: Place, recorded: Any) -> None:
    _, address = place.scheduler()
    place.worker(address, L2L_IMPLICIT_DATA=str(place.folder / "other"))
    code, output = place.run("methods=plain", "seeds=1", "--scheduler", address)
    assert code == 1 and "this worker's database is embedded, not the sweep's" in output, output
    assert not place.started() and "Traceback" not in output


def test_a_worker_outside_the_checkout_loses_nothing(place: Place, recorded: Any) -> None:
    """It ends at the first cell that it is sent, with Python's own words in its terminal."""
    _, address = place.scheduler()
    stranger = place.worker(address, PYTHONPATH="")
    sweep = place.start("methods=plain", "seeds=1", "--scheduler", address)
    read_until(sweep, "no worker is connected; expected one that is started in the checkout")
    stranger.wait()
    place.worker(address)
    assert finish(sweep)[0] == 0
    assert statuses(recorded) == ["COMPLETED"]


def test_a_database_that_goes_away_costs_nothing(place: Place, recorded: Any) -> None:
    sweep = place.start("methods=plain", "seeds=2", "hold=True", "--workers", "1")
    held(place, recorded, 1)
    os.kill(server_process(place.folder / "data"), signal.SIGKILL)
    place.let_end(2)
    code, output = finish(sweep)
    assert code == 0, output
    assert len(complete(recorded)) == 2 and set(place.started().values()) == {1}


def test_printed_lines_run_their_own_cell_in_any_order(place: Place, recorded: Any) -> None:
    code, output = place.run("methods=tuned", "seeds=2", "pause=0.3", "--print")
    lines = output.splitlines()
    assert code == 0 and len(lines) == 5
    assert lines[-1].startswith("python -m experiments.sweep ")
    place.env["PATH"] = f"{os.path.dirname(sys.executable)}:{place.env['PATH']}"
    # a final run's line first: it runs the grid it needs; each line twice, all at once
    commands = [lines[-1], lines[-2], lines[0], lines[0], lines[-1]]
    ended = [finish(p) for p in [place.popen(line, shell=True) for line in commands]]
    assert [code for code, _ in ended] == [0] * 5, ended
    assert len(complete(recorded)) == 4 and set(place.started().values()) == {1}


SBATCH = """#!/bin/sh
for task in $(seq "${1#--array=1-}"); do SLURM_ARRAY_TASK_ID=$task sh -c "$3" & done
wait
"""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_machines_and_slurm_of_the_docs(place: Place, recorded: Any, number: int) -> None:
    """Both machines here; with a stand-in for sbatch that runs the tasks of an array here. The
    commands are those of the page's blocks that say that they are run here."""
    (place.folder / "sbatch").write_text(SBATCH)
    (place.folder / "sbatch").chmod(0o755)
    changes = [{"HOST": "127.0.0.1", "8786": str(free_port())}, {"1-8": "1-2"}, {}]
    page = (ROOT / "docs" / "sweeps.md").read_text()
    block = [block for block in blocks(page) if "tests/drills/test_sweeps.py" in block.reason]
    text = block[number].text
    for old, new in changes[number].items():
        assert old in text
        text = text.replace(old, new)
    python = Path(sys.executable).parent
    place.env["PATH"] = f"{place.folder}:{python}:{place.env['PATH']}"
    *lines, last = text.strip().splitlines()
    for line in lines:
        process = place.popen(["sh", "-c", f"exec {line}"], **QUIET)
        if number == 1:
            wait_for((place.folder / "scheduler.json").exists)
        elif number == 2:
            process.wait()
    code, output = finish(place.popen(["sh", "-c", f"exec {last}"]))
    assert code == 0, output
    assert len(complete(recorded)) == len(set(complete(recorded))) == 2
