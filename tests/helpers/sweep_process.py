"""Real sweeps for the tests: processes in a folder of their own, and what they have run."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy_process import ROOT, environment, finish, own_data, wait_for

from experiments.tracking import open_database

HELPERS = ROOT / "tests" / "helpers"
TOY = str(HELPERS / "toy_cell.py")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Place:
    """A working folder with the database below it; sweeps of the toy training run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(folder / "data", PYTHONPATH=f"{ROOT}:{HELPERS}")
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, sweep: str = TOY, **options: Any) -> subprocess.Popen[str]:
        where = [f"folder={self.folder}"] if sweep == TOY else []
        command = [sys.executable, "-m", "experiments.sweep", sweep, *where, *arguments]
        return self.popen(command, **options)

    def popen(self, command: list[str] | str, **options: Any) -> subprocess.Popen[str]:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options = {"cwd": self.folder, "env": self.env, **pipe, **options}
        self.processes.append(subprocess.Popen(command, **options))
        return self.processes[-1]

    def run(self, *arguments: str, sweep: str = TOY) -> tuple[int, str]:
        return finish(self.start(*arguments, sweep=sweep))

    def scheduler(self, name: str = "one") -> tuple[subprocess.Popen[str], str]:
        """A Dask scheduler, and its address."""
        file = self.folder / f"{name}.json"
        process = self._dask("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0",
                             "--scheduler-file", str(file))  # fmt: skip
        return process, wait_for(lambda: file.exists() and json.loads(file.read_text()))["address"]

    def worker(self, address: str, **variables: str) -> subprocess.Popen[str]:
        """A Dask worker of one process, as a user starts it."""
        return self._dask("worker", address, "--nthreads", "1", "--no-dashboard", **variables)

    def _dask(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dask", words[0], "--host", "127.0.0.1", *words[1:]]
        return self.popen(command, env={**self.env, **variables}, **QUIET)

    def trainings(self) -> list[list[str]]:
        """Cell, process and parent of each training that was started."""
        path = self.folder / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def started(self) -> Counter[str]:
        """How many trainings were started, by cell."""
        return Counter(cell for cell, _, _ in self.trainings())

    def training(self) -> int:
        """The process of the training that was started last."""
        return int(self.trainings()[-1][1])

    def let_end(self, number: int) -> None:
        """The trainings with ``hold=True`` that started first, so many, may end."""
        (self.folder / "leave.new").write_text(str(number))
        (self.folder / "leave.new").replace(self.folder / "leave")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Its processes end with the test."""
    made = Place(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.fixture
def recorded(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The database of the place. A fixture of a plugin is every file's: no other has its name."""
    own_data(monkeypatch, place.folder / "data")
    with open_database() as documents:
        yield documents


def parent(process: int) -> int:
    """The process that started this one; 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).ppid()
    return 0


def complete(database: Any) -> list[str]:
    """The cells of the completed runs, one entry a run."""
    return [run["config"]["cell"] for run in database["runs"].find({"status": "COMPLETED"})]
