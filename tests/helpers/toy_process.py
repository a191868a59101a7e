"""Real processes for the tests of the tracking: runs of the toy experiment, database servers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pymongo
from bson import Binary, ObjectId

from experiments.drills.server import Server as Server
from experiments.tracking.journal import Journal

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
ROOT = Path(__file__).parents[2]
FAST = {"L2L_IMPLICIT_MONGO_TIMEOUT": "3", "L2L_IMPLICIT_MONGO_PATIENCE": "100"}
"""An absent database is soon noticed; one that comes back on a busy machine is waited for."""

DEADLINE = 300.0  # seconds: only a test that fails waits so long, on any machine


def environment(data: Path, **variables: str) -> dict[str, str]:
    """This process's environment with the data folder and variables of a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("L2L_IMPLICIT_")}
    home = {"HOME": str(data), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **home, **FAST, "L2L_IMPLICIT_DATA": str(data), **variables}


def start(env: Mapping[str, str], *arguments: str, module: str = "") -> subprocess.Popen[str]:
    """Start the toy experiment (or a module) and return at once."""
    program = ["-m", module] if module else ["tests/helpers/toy_experiment.py"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=dict(env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; its exit status and all it printed."""
    output, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, output


def run(env: Mapping[str, str], *arguments: str, module: str = "") -> tuple[int, str]:
    """Run the toy experiment (or a module) to its end."""
    return finish(start(env, *arguments, module=module))


def wait_for(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not reached within {seconds} s")


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a process prints up to and with this text; `finish` has the rest."""
    assert process.stdout is not None
    seen = b""
    while text.encode() not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, f"expected {text!r}, got {seen.decode()!r}"
        seen += piece
    return seen.decode()


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    return Path(f"/proc/{process}").exists()


def journals(data: Path) -> list[Path]:
    """The journals that runs have left."""
    return sorted((data / "journals").glob("*.jsonl"))


def points(database: Any, run_id: int) -> dict[str, list[Any]]:
    """{metric: values in the order of their steps}, after checking that no point is double."""
    found = {}
    for metric in database["metrics"].find({"run_id": run_id}):
        assert metric["steps"] == list(range(len(metric["steps"])))
        assert len(metric["values"]) == len(metric["timestamps"]) == len(metric["steps"])
        found[metric["name"]] = metric["values"]
    return found


def write_journal(path: Path, run_id: int, losses: list[float]) -> Path:
    """The journal of a run that has completed."""
    journal = Journal(path, {"token": path.name, "database": "embedded", "host": "h"})
    document = {"_id": run_id, "meta": {"journal": path.name}, "status": "RUNNING", "info": {}}
    journal.append({"start": {**document, "artifacts": [], "captured_out": ""}})
    for step, loss in enumerate(losses):
        journal.append({"metric": "loss", "step": step, "value": loss, "time": NOW})
    journal.append({"output": [0, "ab\rc"]})
    journal.append({"output": [2, "d"]})
    artifact = {"artifact": "a.bin", "id": ObjectId(), "data": Binary(b"\x00" * 300_000)}
    journal.append({**artifact, "metadata": None, "content_type": "x/y"})
    journal.append({"set": {"status": "COMPLETED", "stop_time": NOW}})
    journal.close()
    return path


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The runs' database at an address."""
    client: Any = pymongo.MongoClient(address, serverSelectionTimeoutMS=5000)
    yield client["l2l_implicit"]
    client.close()
