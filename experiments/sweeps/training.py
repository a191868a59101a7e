"""A cell's training as a process of its own: started, watched, stopped, explained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps.cells import Cell
from experiments.tracking import supervisor
from experiments.tracking.ingredient import REPOSITORY

NICENESS = 10
GRACE = 30.0
"""Seconds for a training that is told to stop: it brings its record into the database."""

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
TQDM_INTERVAL = "30"
CONFIG, STATE = "config.json", "checkpoint.pt"
"""In a run's folder: `experiments.training.checkpoint`, not imported since it needs torch."""

TAIL = 20_000
KILLED = "killed"


def bound_to(parent: int, niceness: int = 0) -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=...)`: the child dies with this parent (Linux)."""

    def tie() -> None:
        supervisor.die_with_parent()
        if os.getppid() != parent:  # it has died before the line above
            os._exit(1)
        os.nice(niceness)

    return tie


def environment() -> dict[str, str]:
    """One thread, few progress lines, and this repository importable."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": TQDM_INTERVAL}
    return {**os.environ, **ONE_THREAD, **own}


def command(cell: Cell, mongo: str | None, checkpoint: Path | None = None) -> list[str]:
    """The cell's run, from its start or a checkpoint, recorded in the sweep's database."""
    option = [] if mongo is None else ["-m", mongo]
    what = ["with", *cell.arguments()] if checkpoint is None else [f"resume={checkpoint}"]
    return [sys.executable, "-m", cell.module, *option, *what]


def find_checkpoint(cell: Cell, run_ids: Iterable[Any]) -> Path | None:
    """The folder of the first of these runs that has left a checkpoint of this cell here."""
    for run_id in run_ids:
        folder = Path(str(cell.settings.get("output", "runs"))) / str(run_id)
        config = folder / CONFIG
        # another database's run may have the same number
        if (folder / STATE).is_file() and config.is_file():
            if json.loads(config.read_text()).get("cell") == cell.identity:
                return folder
    return None


def is_death(reason: str) -> bool:
    """Whether a failure came from outside: its signal, or its worker's end."""
    return KILLED in reason and not reason.startswith("exit status")


class Training:
    """The process of one cell.

    Args:
        command: what to run.
        log: file that takes what it prints.
        lock: descriptor of the owner's lock, so that the claim counts as held while this lives.
    """

    def __init__(self, command: Sequence[str], log: Path, lock: int) -> None:
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                pass_fds=(lock,),
                start_new_session=True,
                preexec_fn=bound_to(os.getpid(), NICENESS),
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status, None if it still runs after this time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """SIGTERM to the whole group, SIGKILL to what has not ended after `GRACE`."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            if self.wait(patience) is not None:
                return

    def reason(self) -> str:
        """Why it failed: its signal, or the last line it printed."""
        status = self.process.returncode
        if status is not None and status < 0:
            return f"{KILLED} by {signal.Signals(-status).name}"
        return f"exit status {status}: {self._last_line()}"

    def _last_line(self) -> str:
        with open(self._log, "rb") as file:
            file.seek(max(self._start, self._log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it printed nothing"])[-1]
