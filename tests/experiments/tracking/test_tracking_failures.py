"""What happens to a run's record when processes die: real runs, real servers, real signals."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_process import (
    Server,
    connected,
    finish,
    is_alive,
    journals,
    points,
    read_until,
    run,
    served,
    server_process,
    start,
    wait_for,
    write_journal,
)

from experiments.tracking.uploader import upload_journal

pytest_plugins = ("toy_process",)
UPLOAD = "experiments.tracking.upload"
STEPS = 40
SLOW = ("-b", "0.2", "with", f"steps={STEPS}")
LOSSES = [1 / (1 + step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def embedded(home: Path) -> Iterator[Any]:
    """The embedded server's database, kept up by the documented command."""
    with served(home) as address, connected(address) as database:
        yield database


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A run with ``hold=`` this file waits at its middle until the file is there."""
    return tmp_path / "gate"


def half_done(database: Any, run_id: int) -> bool:
    return len(points(database, run_id).get("train/loss", ())) > STEPS // 4


def latest(database: Any) -> dict[str, Any]:
    return database["runs"].find_one({}, sort=[("_id", -1)]) or {"_id": 0}


def printed(run: dict[str, Any]) -> list[str]:
    """Without what is said of the outage."""
    return [line for line in run["captured_out"].splitlines() if "database" not in line]


def test_killing_the_embedded_server_costs_nothing(home: Path, embedded: Any, gate: Path) -> None:
    number = latest(embedded)["_id"] + 1
    process = start(home, *SLOW, f"hold={gate}")
    wait_for(lambda: half_done(embedded, number))
    old = server_process(home)
    os.kill(old, signal.SIGKILL)
    gate.touch()
    code, output = finish(process)
    assert code == 0, output
    assert not is_alive(old) and server_process(home) != old
    assert latest(embedded)["status"] == "COMPLETED"
    assert points(embedded, number)["train/loss"] == LOSSES
    assert not journals(home)


def test_what_is_uploaded_survives_a_crash_just_afterwards(tmp_path: Path, server: Server) -> None:
    losses = [float(step) for step in range(50)]
    with connected(server.address) as database:
        for number in (1, 2):
            write_journal(tmp_path / "r", number, losses)
            upload_journal(tmp_path / "r", database)
            server.kill()
            server.start()
            assert points(database, number) == {"loss": losses}
            assert database["runs"].find_one({"_id": number})["status"] == "COMPLETED"


def test_an_outage_for_a_while_and_one_for_good(tmp_path: Path, server: Server, gate: Path) -> None:
    seeded = (*SLOW, "seed=1", "say=hello", f"hold={gate}")
    process = start(tmp_path, *seeded, **server.url)
    with connected(server.address) as database:
        wait_for(lambda: half_done(database, 1))
        server.kill()
        read_until(process, "The database is away")
        gate.touch()
        wait_for(lambda: "COMPLETED" in journals(tmp_path)[0].read_text())  # the run goes on
        server.start()
        code, output = finish(process)
        assert code == 0 and "The database is back" in output, output
        assert latest(database)["status"] == "COMPLETED" and not journals(tmp_path)

        gate.unlink()
        process = start(tmp_path, *seeded, **server.url, L2L_IMPLICIT_MONGO_PATIENCE="0.5")
        # the run's own document goes last, and to the disk
        wait_for(lambda: half_done(database, 2) and latest(database)["info"].get("metrics"))
        server.kill()
        gate.touch()
        code, output = finish(process)
        (kept,) = journals(tmp_path)
        assert code == 1 and "error: run 2 is not wholly in the database" in output
        assert f"python -m {UPLOAD} {kept}" in output
        server.start()
        assert latest(database)["status"] == "RUNNING"
        code, output = run(tmp_path, str(kept), module=UPLOAD, **server.url)
        assert code == 0 and "run 2: COMPLETED" in output

        undisturbed, restored = database["runs"].find().sort("_id", 1)
        assert points(database, 1)["train/loss"] == points(database, 2)["train/loss"] == LOSSES
        same = ("status", "config", "result", "command", "host", "resources")
        assert {key: undisturbed[key] for key in same} == {key: restored[key] for key in same}
        assert printed(undisturbed) == printed(restored)
        assert undisturbed["experiment"]["sources"] == restored["experiment"]["sources"]
        assert undisturbed.keys() == restored.keys()
        names = [file["filename"] for file in database["fs.files"].find()]
        assert {f"artifact://runs/{number}/note.py" for number in (1, 2)} <= set(names)
    assert not journals(tmp_path)


@pytest.mark.usefixtures("not_by_nohup")
def test_a_signal_interrupts_the_run(home: Path, embedded: Any) -> None:
    before = latest(embedded)["_id"]
    signals = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
    processes = [start(home, *SLOW, "steps=100000", "pause=0.04") for _ in signals]
    new = [before + 1, before + 2, before + 3]
    wait_for(lambda: all(half_done(embedded, number) for number in new))
    for process, number in zip(processes, signals, strict=True):
        process.send_signal(number)
    assert [finish(process)[0] for process in processes] == list(signals.values())
    for number in new:
        assert embedded["runs"].find_one({"_id": number})["status"] == "INTERRUPTED"
        logged = points(embedded, number)["train/loss"]
        assert logged == [1 / (1 + step) for step in range(len(logged))]
        assert STEPS // 4 < len(logged) < 100000


STARTING = {"train": ["-u"], "report": [], "sweep": ["smoke", "--list"], "tracking.export": ["f"],
            "tracking.upload": ["f"]}  # fmt: skip


@pytest.mark.parametrize("module", STARTING)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_ctrl_c_while_a_command_starts_is_no_traceback(tmp_path: Path, module: str) -> None:
    words = STARTING[module]
    process = start(tmp_path, *words, module=f"experiments.{module}", folder=tmp_path)
    while process.poll() is None and "_cbson" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code in (-signal.SIGINT, 128 + signal.SIGINT) and "Traceback" not in output, output


def test_the_next_run_marks_a_killed_one(home: Path, embedded: Any) -> None:
    number = latest(embedded)["_id"] + 1
    process = start(home, "-b", "3000", "with", "steps=100000", "pause=0.05")
    (journal,) = wait_for(lambda: journals(home))
    wait_for(lambda: journal.read_text().count("train/loss") > 5)
    process.kill()
    finish(process)
    assert latest(embedded)["status"] == "RUNNING"
    code, output = run(home, "with", "quick")
    assert code == 0 and f"Uploaded the record that run {number} left; its end is" in output
    killed = embedded["runs"].find_one({"_id": number})
    assert killed["status"] == "FAILED" and killed["fail_trace"][0].startswith("killed")
    assert len(points(embedded, number)["train/loss"]) > 5
    assert not journals(home)
