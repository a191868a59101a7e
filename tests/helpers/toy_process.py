"""Real processes for the tests of the tracking: runs of the toy experiment, database servers."""

from __future__ import annotations

import os
import signal
import socket
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


def start(
    env: Mapping[str, str], *arguments: str, module: str = "", folder: Path = ROOT
) -> subprocess.Popen[str]:
    """Start the toy experiment (or a module), in a folder, and return at once."""
    program = ["-m", module] if module else ["tests/helpers/toy_experiment.py"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env={**env, "PYTHONPATH": str(ROOT)},
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
    """Whether a process of this number runs; one that only its parent has yet to see does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def server_processes(data: Path) -> list[int]:
    """The embedded servers of a data folder, by their command lines (Linux)."""
    words = [str(data).encode() + b"/mongodb/data", b"--storage-path"]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if all(word in line for word in words):
            found.append(int(path.parent.name))
    return found


def server_process(data: Path) -> int:
    """The embedded server of a data folder, once it is up."""
    return int(wait_for(lambda: server_processes(data))[0])


def free_port() -> int:
    """Of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A database server with a port, to be killed and started again there.

    Args:
        folder: of its data, made if it is not there.
        options: further ones of its command line.

    Attributes:
        address: host and port.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        port = free_port()
        self.address, self.folder = f"127.0.0.1:{port}", folder
        folder.mkdir(exist_ok=True)
        (folder / "empty.toml").write_text("")  # keeps a stray secantusd.toml from being read
        program = str(Path(sys.executable).with_name("secantusd-py"))
        self._command = [program, "--config", "empty.toml", "--host", "127.0.0.1", "--port"]
        self._command += [str(port), "--storage-path", "data", "--standalone", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client: Any = pymongo.MongoClient(self.address, serverSelectionTimeoutMS=60_000)
        client.admin.command("ping")
        client.close()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


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
    journal.seal()
    journal.close()
    return path


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The runs' database at an address."""
    client: Any = pymongo.MongoClient(address, serverSelectionTimeoutMS=5000)
    yield client["l2l_implicit"]
    client.close()
