"""A Dask worker's part of a sweep: lock a cell, train it in a process of its own, say how it ended.

A training that is killed is tried once more, from its checkpoint. What an error of its own has
ended is not, unless a checkpoint was to blame.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import dask
from distributed.core import Status
from distributed.worker import get_worker, thread_state
from pymongo.errors import PyMongoError

from experiments.sweeps import tied
from experiments.sweeps.definition import COMPLETED, FAILED, INTERRUPTED, RUNNING, Cell
from experiments.sweeps.listing import counted, patiently, runs_of
from experiments.sweeps.lock import LEASE, Lock, token_of
from experiments.sweeps.runs import Run
from experiments.tracking import UserError
from experiments.tracking.database import Database, choose
from experiments.tracking.errors import one_line
from experiments.tracking.experiment import REPOSITORY
from experiments.tracking.uploader import upload_abandoned
from experiments.tracking.values import is_name

ATTEMPTS, POLL, BEAT, NICENESS = 2, 0.2, 2.0, 10
GRACE = 30.0  # seconds for a training that is told to stop: it brings its record into the database
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# In a run's folder: `experiments.training.checkpoint`, not imported since it needs torch.
CONFIG, STATE = "config.json", "checkpoint.pt"


class Order(NamedTuple):
    """What a worker is told; the same from two clients that want the same cell."""

    cell: Cell
    mongo: str | None  # Sacred's -m, as each worker is to read it
    database: str  # `token_of` the sweep's database
    scheduler: str  # its id
    log: str  # file for what the training prints, on the worker's machine
    redo: bool  # whether a run of other code does not count


def run_cell(order: Order) -> tuple[str, str]:
    """Run a cell if it is missing; its state and the reason of one that is not completed.

    RUNNING: somebody else has its lock.
    """
    try:
        with closing(Database(choose(order.mongo))) as database:
            if patiently(database, partial(token_of, database)) != order.database:
                return INTERRUPTED, (
                    f"this worker's database is {database.label}, not the sweep's; expected one"
                    " MongoDB for all machines: set L2L_IMPLICIT_MONGO_URL, or give -m"
                )
            with closing(Lock(database, order.cell.identity, order.scheduler)) as lock:
                if not patiently(database, lock.take):
                    return RUNNING, ""
                ended = _Attempts(database, order, lock).run()
                patiently(database, lock.release)
                return ended
    except (UserError, PyMongoError) as error:
        return INTERRUPTED, f"no database: {one_line(error)}"


class _Attempts:
    """A cell's trainings, one after the other, each in a process that dies with this one."""

    def __init__(self, database: Database, order: Order, lock: Lock) -> None:
        self._database, self._order, self._lock = database, order, lock
        self._worker, self._key = get_worker(), thread_state.key
        self._log = Path(order.log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._output, self._logger = open_log(self._log), logging.Logger("sweep")
        self._logger.addHandler(logging.StreamHandler(self._output))

    def run(self) -> tuple[str, str]:
        """Until the cell is completed, or is not to be tried again: its state, and why."""
        state, reason, cell = self._look(), "", self._order.cell
        for _ in range(ATTEMPTS):
            if state == COMPLETED:
                break
            # where a run that was stopped, of the code that is here, may go on
            known = [run.id for run in self._runs if run.state != FAILED and not run.changed]
            checkpoint = None if state == FAILED else find_checkpoint(cell, known[::-1])
            training, start = self._start(checkpoint)
            stopped = self._watch(training)
            if self._look() == COMPLETED:
                return COMPLETED, ""
            if stopped:
                return INTERRUPTED, stopped
            state, reason = how_it_ended(training.returncode, self._log, start)
            if state == FAILED and checkpoint is None:
                break
        return state, reason

    def _look(self) -> str:
        """Completed, failed, or to go on, with the killed runs of this machine in the database."""
        identity = self._order.cell.identity

        def ask() -> list[Run]:
            upload_abandoned(self._database, self._logger)
            return runs_of(self._database, [identity]).get(identity, [])

        self._runs = patiently(self._database, ask)
        if counted(self._runs, self._order.redo) is not None:
            return COMPLETED
        return FAILED if self._runs and self._runs[-1].state == FAILED else INTERRUPTED

    def _start(self, checkpoint: Path | None) -> tuple[subprocess.Popen[bytes], int]:
        """The process, from its start or a checkpoint, and where in the log its output begins."""
        cell, mongo = self._order.cell, self._order.mongo
        option = [] if mongo is None else ["-m", mongo]
        words = [sys.executable, tied.__file__, cell.module, *option]
        words += ["with", *cell.arguments()] if checkpoint is None else [f"resume={checkpoint}"]
        print(f"$ {shlex.join(words)}", file=self._output, flush=True)
        start = self._log.stat().st_size
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=self._output, stderr=self._output,
            env=environment(), pass_fds=(self._lock.descriptor,), start_new_session=True,
        )  # fmt: skip
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process, start

    def _wanted(self) -> bool:
        """Whether Dask still asks for this task: a client does, of a worker that goes on."""
        task = self._worker.state.tasks.get(self._key)
        going = self._worker.status == Status.running
        return going and task is not None and task.state != "cancelled"

    def _watch(self, training: subprocess.Popen[bytes]) -> str:
        """Until the training ends, or is stopped; why it was stopped."""
        beaten = tried = time.monotonic()
        while not _ends(training, POLL):
            now, held = time.monotonic(), True
            if now - tried > BEAT:
                tried = now
                try:
                    held, beaten = self._lock.beat(), now
                except PyMongoError:
                    with suppress(UserError):  # not yet
                        self._database.revive()
            reasons = {"stopped": not self._wanted(), "another machine has taken it": not held,
                       "the database is away": now - beaten > 0.8 * LEASE}
            if reason := next((why for why, so in reasons.items() if so), ""):
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError):
                        os.killpg(training.pid, number)
                    if _ends(training, GRACE):
                        break
                return reason
        return ""


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it does within this time."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def open_log(path: Path) -> TextIO:
    """To append to; OSError for a link, which may lead to anything, or a FIFO."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, "a", errors="backslashreplace",
                opener=lambda name, own: os.open(name, own | flags, 0o666))  # fmt: skip


def environment() -> dict[str, str]:
    """One thread, few progress lines, and this repository importable.

    Dask's own variables go: one of them has its workers give freed memory back to the system, and
    a training that does so takes up to twice the time for a step.
    """
    theirs = dask.config.get("distributed.nanny.pre-spawn-environ")
    kept = {name: text for name, text in os.environ.items() if text != str(theirs.get(name))}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), kept.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
    return {**kept, **ONE_THREAD, **own}


def find_checkpoint(cell: Cell, run_ids: Sequence[Any]) -> Path | None:
    """The folder of the first of these runs that has left a checkpoint of this cell here."""
    for name in filter(is_name, map(str, run_ids)):
        folder = Path(str(cell.settings.get("output", "runs"))) / name
        # another database's run may have the same number, and the file be damaged
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            if (folder / STATE).is_file() and (folder / CONFIG).is_file():  # no FIFO
                if json.loads((folder / CONFIG).read_text()).get("cell") == cell.identity:
                    return folder
    return None


def how_it_ended(status: int, log: Path, start: int) -> tuple[str, str]:
    """State and reason of what did not complete: a signal is a death from outside, no failure."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return INTERRUPTED, f"killed by {signal.Signals(number).name}"
    if status == 0:
        return FAILED, "it ended well, but no completed run of this cell is in the database"
    with open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    return FAILED, f"exit status {status}: {last_line(text)}"


def last_line(text: str) -> str:
    """The last error among a program's lines, else the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
