"""Real sweeps for the tests: processes in a folder of their own, and what they have run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from toy_process import ROOT, environment, finish

TOY = str(ROOT / "tests" / "helpers" / "toy_sweep.py")


class Place:
    """A working folder with the database below it; sweeps of the toy training run in it."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.env = environment(folder / "data", **variables)
        self.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"

    def start(self, *arguments: str, sweep: str = TOY) -> subprocess.Popen[str]:
        """Start the sweep command and return at once."""
        where = [f"folder={self.folder}"] if sweep == TOY else []
        command = [sys.executable, "-m", "experiments.sweep", sweep, *where, *arguments]
        return self.popen(command)

    def popen(self, command: list[str] | str, **options: Any) -> subprocess.Popen[str]:
        """Any command in this place."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, **pipe, **options)

    def run(self, *arguments: str, sweep: str = TOY) -> tuple[int, str]:
        """The sweep command's exit status and output."""
        return finish(self.start(*arguments, sweep=sweep))

    def started(self) -> Counter[str]:
        """How many trainings were started, by cell."""
        return Counter(cell for cell, _ in self._started())

    def training(self) -> int:
        """The process of the training that was started last, 0 if none was."""
        return int(self._started()[-1][1]) if self._started() else 0

    def let_end(self, number: int) -> None:
        """The trainings with ``hold=True`` that started first, so many, may end."""
        (self.folder / "leave.new").write_text(str(number))
        (self.folder / "leave.new").replace(self.folder / "leave")

    def _started(self) -> list[list[str]]:
        path = self.folder / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
