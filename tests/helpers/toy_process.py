"""Real processes for the tests of the tracking: runs of the toy experiment, database servers."""

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest
from bson import Binary, ObjectId

from experiments.tracking import open_database
from experiments.tracking.journal import Journal

ROOT = Path(__file__).parents[2]
FAST = {"L2L_IMPLICIT_MONGO_TIMEOUT": "3", "L2L_IMPLICIT_MONGO_PATIENCE": "100"}
"""An absent database is soon noticed; one that comes back on a busy machine is waited for."""

DEADLINE = 300.0  # seconds: only a test that fails waits so long, on any machine


def environment(data: Path, **variables: str) -> dict[str, str]:
    """This process's environment with the data folder and variables of a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("L2L_IMPLICIT_")}
    home = {"HOME": str(data), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **home, **FAST, "L2L_IMPLICIT_DATA": str(data), **variables}


def own_data(patch: pytest.MonkeyPatch, data: Path) -> Path:
    """The data folder as this process's own, and no other database named."""
    patch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    patch.setenv("HOME", str(data.parent))
    patch.setenv("L2L_IMPLICIT_DATA", str(data))
    return data


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, also this process's own."""
    return own_data(monkeypatch, tmp_path / "data")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder for all tests of a file, also this process's own."""
    with pytest.MonkeyPatch.context() as patch:
        yield own_data(patch, tmp_path_factory.mktemp("my data"))


@pytest.fixture(scope="module")
def documents(home: Path) -> Iterator[Any]:
    """Its embedded database: starting one takes a second."""
    with open_database() as found:
        yield found


@pytest.fixture
def database(documents: Any) -> Any:
    """The same, emptied."""
    for name in documents.list_collection_names():
        documents[name].delete_many({})
    return documents


def start(data: Path, *arguments: str, module: str = "", folder: Path = ROOT, **variables: str
          ) -> subprocess.Popen[str]:  # fmt: skip
    """Start the toy experiment (or a module), in a folder, and return at once."""
    program = ["-m", module] if module else [str(ROOT / "tests/helpers/toy_experiment.py")]
    env = environment(data, PYTHONPATH=str(ROOT), **variables)
    return subprocess.Popen([sys.executable, *program, *arguments], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; its exit status and all it printed."""
    output, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, output


def run(data: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Run the toy experiment (or a module) to its end."""
    return finish(start(data, *arguments, **options))


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not reached within {DEADLINE} s")


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
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def server_processes(data: Path) -> list[int]:
    """The embedded servers of a data folder, by their command lines."""
    words = {f"{data}/mongodb/data", "--storage-path"}
    return [process.pid for process in psutil.process_iter(["cmdline"])
            if words <= set(process.info["cmdline"] or ())]  # fmt: skip


def server_process(data: Path) -> int:
    """The embedded server of a data folder, once it is up."""
    return int(wait_for(lambda: server_processes(data))[0])


@contextmanager
def served(data: Path) -> Iterator[str]:
    """The address that the documented command prints, while it is up."""
    process = start(data, module="experiments.tracking.serve")
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    assert finish(process)[0] == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Server:
    """A database server with a port, to be killed and started again there.

    `address` is host and port, `url` the environment variable that names it.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        port = free_port()
        self.address, self.folder = f"127.0.0.1:{port}", folder
        self.url = {"L2L_IMPLICIT_MONGO_URL": f"mongodb://{self.address}"}
        folder.mkdir(exist_ok=True)
        (folder / "empty.toml").write_text("")  # keeps a stray secantusd.toml from being read
        program = str(Path(sys.executable).with_name("secantusd-py"))
        self._command = [program, "--config", "empty.toml", "--host", "127.0.0.1", "--port"]
        self._command += [str(port), "--storage-path", "data", "--standalone", *options]

    def start(self) -> None:
        """Return when it answers."""
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client: Any = pymongo.MongoClient(self.address, serverSelectionTimeoutMS=60_000)
        with closing(client):
            client.admin.command("ping")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def journals(data: Path) -> list[Path]:
    return sorted((data / "journals").glob("*.jsonl"))


def points(database: Any, run_id: int) -> dict[str, list[Any]]:
    """{metric: values in the order of their steps}, after checking that no point is double."""
    found = {}
    for metric in database["metrics"].find({"run_id": run_id}):
        assert metric["steps"] == list(range(len(metric["steps"])))
        assert len(metric["values"]) == len(metric["timestamps"]) == len(metric["steps"])
        found[metric["name"]] = metric["values"]
    return found


def write_journal(path: Path, run_id: int = 1500, losses: Sequence[float] = (0.5, 1.5, 2.5, 3.5),
                  artifact: bytes = b"", sealed: bool = True) -> list[bytes]:  # fmt: skip
    """The journal of a run that has completed; its lines."""
    now, token = datetime(2026, 1, 1, tzinfo=UTC), path.name
    header = {"token": token, "database": "embedded", "host": platform.node()}
    with closing(Journal(path, header)) as journal:
        document = {"_id": run_id, "meta": {"journal": token}, "status": "RUNNING", "info": {}}
        journal.append({"start": {**document, "artifacts": [], "captured_out": ""}})
        for step, loss in enumerate(losses):
            journal.append({"metric": "loss", "step": step, "value": loss, "time": now})
        if artifact:
            journal.append({"output": [0, "ab\rc"]})
            journal.append({"output": [2, "d"]})
            journal.append({"artifact": "a.bin", "id": ObjectId(), "data": Binary(artifact),
                            "metadata": None, "content_type": "x/y"})  # fmt: skip
        journal.append({"set": {"status": "COMPLETED", "stop_time": now, "result": float("nan")}})
        if sealed:
            journal.seal()
    return path.read_bytes().splitlines(keepends=True)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The runs' database at an address."""
    client: Any = pymongo.MongoClient(address, serverSelectionTimeoutMS=5000)
    with closing(client):
        yield client["l2l_implicit"]
