"""Real sweeps for the tests: processes in a folder of their own, and what they have run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from toy_process import ROOT, environment, finish, wait_for

TOY = str(ROOT / "tests" / "helpers" / "toy_sweep.py")


class Place:
    """A working folder with the database below it; sweeps of the toy training run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
        self.env = environment(folder / "data", PYTHONPATH=path)
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, sweep: str = TOY, **options: Any) -> subprocess.Popen[str]:
        """Start the sweep command and return at once."""
        where = [f"folder={self.folder}"] if sweep == TOY else []
        command = [sys.executable, "-m", "experiments.sweep", sweep, *where, *arguments]
        return self.popen(command, **options)

    def popen(self, command: list[str] | str, **options: Any) -> subprocess.Popen[str]:
        """Any command in this place."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options = {"cwd": self.folder, "env": self.env, **pipe, **options}
        self._started.append(subprocess.Popen(command, **options))
        return self._started[-1]

    def run(self, *arguments: str, sweep: str = TOY) -> tuple[int, str]:
        """The sweep command's exit status and output."""
        return finish(self.start(*arguments, sweep=sweep))

    def scheduler(self, name: str = "one") -> tuple[subprocess.Popen[str], str]:
        """A Dask scheduler, and its address."""
        file = self.folder / f"{name}.json"
        file.unlink(missing_ok=True)
        process = self._dask("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0",
                             "--scheduler-file", str(file))  # fmt: skip
        return process, wait_for(lambda: file.exists() and json.loads(file.read_text()))["address"]

    def worker(self, address: str, **variables: str) -> subprocess.Popen[str]:
        """A Dask worker of one process, as a user starts it."""
        return self._dask("worker", address, "--nthreads", "1", "--no-dashboard", **variables)

    def _dask(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dask", words[0], "--host", "127.0.0.1", *words[1:]]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return self.popen(command, env={**self.env, **variables}, **quiet)

    def clear(self) -> None:
        """End what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()

    def started(self) -> Counter[str]:
        """How many trainings were started, by cell."""
        return Counter(cell for cell, _, _ in self.trainings())

    def training(self) -> int:
        """The process of the training that was started last, 0 if none was."""
        return int(self.trainings()[-1][1]) if self.trainings() else 0

    def let_end(self, number: int) -> None:
        """The trainings with ``hold=True`` that started first, so many, may end."""
        (self.folder / "leave.new").write_text(str(number))
        (self.folder / "leave.new").replace(self.folder / "leave")

    def trainings(self) -> list[list[str]]:
        """Cell, process and parent of each training that was started."""
        path = self.folder / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def parent(process: int) -> int:
    """The process that started this one."""
    found = subprocess.run(["ps", "-o", "ppid=", "-p", str(process)], capture_output=True)
    return int(found.stdout or 0)


def complete(database: Any) -> list[str]:
    """The cells of the completed runs, one entry a run."""
    return [run["config"]["cell"] for run in database["runs"].find({"status": "COMPLETED"})]
