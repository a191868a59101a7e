"""A Dask worker's part of a sweep: lock a cell, train it in a process of its own, say how it ended.

A training that is killed is tried once more, from its checkpoint. What an error of its own has
ended is not, unless a checkpoint was to blame.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pymongo.errors import PyMongoError

from experiments.sweeps import tied
from experiments.sweeps.cells import COMPLETED, FAILED, INTERRUPTED, RUNNING, Cell
from experiments.sweeps.lock import LEASE, Lock, token_of
from experiments.sweeps.records import counted, patiently, runs_of, state_of
from experiments.tracking import UserError
from experiments.tracking.database import Database, choose
from experiments.tracking.embedded import data_folder
from experiments.tracking.experiment import REPOSITORY
from experiments.tracking.uploader import upload_abandoned

ATTEMPTS = 2
POLL, BEAT = 0.2, 2.0
NICENESS = 10
GRACE = 30.0
"""Seconds for a training that is told to stop: it brings its record into the database."""

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
CONFIG, STATE = "config.json", "checkpoint.pt"
"""In a run's folder: `experiments.training.checkpoint`, not imported since it needs torch."""

TAIL = 20_000
_locked_here: set[str] = set()


@dataclass(frozen=True)
class Order:
    """What a worker is told; the same from two clients that want the same cell.

    Attributes:
        mongo: Sacred's -m, as each worker is to read it.
        database: `token_of` the sweep's database.
        scheduler: its id.
        log: file for what the training prints, on the worker's machine.
        redo: whether a run of other code does not count.
    """

    cell: Cell
    mongo: str | None
    database: str
    scheduler: str
    log: str
    redo: bool


def run_cell(order: Order) -> tuple[str, str]:
    """Run a cell if it is missing; its state and the reason of one that is not completed.

    RUNNING: somebody else has its lock.
    """
    wanted = _asked_by_dask()
    try:
        with closing(Database(choose(order.mongo))) as database:
            if patiently(database, partial(token_of, database)) != order.database:
                return INTERRUPTED, (
                    f"this worker's database is {database.label}, not the sweep's; expected one"
                    " MongoDB for all machines: set L2L_IMPLICIT_MONGO_URL, or give -m"
                )
            with _locked(database, order) as lock:
                return (RUNNING, "") if lock is None else _Attempts(database, order, lock, wanted)()
    except (UserError, PyMongoError) as error:
        return INTERRUPTED, f"no database: {' '.join(str(error).split())}"


def trains_here() -> bool:
    """Whether this process has a cell in its hands."""
    return bool(_locked_here)


def _asked_by_dask() -> Callable[[], bool]:
    """Whether this task is still wanted: by a client, of a worker that goes on."""
    from distributed.core import Status
    from distributed.worker import get_worker, thread_state

    worker, key = get_worker(), thread_state.key

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return worker.status == Status.running and task is not None and task.state != "cancelled"

    return wanted


@contextmanager
def _locked(database: Database, order: Order) -> Iterator[Lock | None]:
    lock = Lock(database, order.cell.identity, order.scheduler)
    try:
        if not patiently(database, lock.take):
            yield None
            return
        _locked_here.add(order.cell.identity)
        yield lock
        patiently(database, lock.release)
    finally:
        lock.close()
        _locked_here.discard(order.cell.identity)


class _Attempts:
    def __init__(self, database: Database, order: Order, lock: Lock,
                 wanted: Callable[[], bool]) -> None:
        self._database, self._order, self._lock, self._wanted = database, order, lock, wanted
        self._log = Path(order.log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._logger = logging.Logger("sweep")
        self._logger.addHandler(logging.FileHandler(self._log, delay=True))

    def __call__(self) -> tuple[str, str]:
        state, reason = patiently(self._database, self._look), ""
        anew = state == FAILED  # after an error of its own
        for _ in range(ATTEMPTS):
            if state == COMPLETED:
                break
            checkpoint = None if anew else self._checkpoint()
            training = _Training(command(self._order.cell, self._order.mongo, checkpoint),
                                 self._log, self._lock.descriptor)  # fmt: skip
            stopped = self._watch(training)
            state = patiently(self._database, self._look)
            if state == COMPLETED:
                break
            if stopped:
                return INTERRUPTED, stopped
            state, reason = training.explain()
            if state == FAILED and (checkpoint is None or anew):
                break
            anew = state == FAILED
        return state, "" if state == COMPLETED else reason

    def _look(self) -> str:
        """The cell's state in the database, killed runs of this machine included."""
        upload_abandoned(self._database, data_folder("journals"), self._logger)
        identity = self._order.cell.identity
        self._runs = runs_of(self._database, [identity]).get(identity, [])
        if counted(self._runs, self._order.redo) is not None:
            return COMPLETED
        state = state_of(self._runs[-1].document if self._runs else None)
        return INTERRUPTED if state == COMPLETED else state

    def _checkpoint(self) -> Path | None:
        """Where a run that was stopped, of the code that is here, may go on."""
        stopped = [r for r in self._runs if not r.changed and state_of(r.document) != FAILED]
        return find_checkpoint(self._order.cell, [run.document["_id"] for run in reversed(stopped)])

    def _watch(self, training: _Training) -> str:
        """Until the training ends, or is stopped; why it was stopped."""
        beaten = tried = time.monotonic()
        while training.wait(POLL) is None:
            now, held = time.monotonic(), True
            if now - tried > BEAT:
                tried = now
                try:
                    held, beaten = self._lock.beat(), now
                except PyMongoError:
                    with suppress(UserError):  # not yet
                        self._database.revive()
            reasons = {"stopped": not self._wanted(), "another machine has taken it": not held,
                       "the database is away": now - beaten > 0.8 * LEASE}  # fmt: skip
            if stopped := next((why for why, so in reasons.items() if so), ""):
                training.stop()
                return stopped
        return ""


def environment() -> dict[str, str]:
    """One thread, few progress lines, and this repository importable."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
    return {**os.environ, **ONE_THREAD, **own}


def command(cell: Cell, mongo: str | None, checkpoint: Path | None) -> list[str]:
    """The cell's run, from its start or a checkpoint, recorded in the sweep's database."""
    option = [] if mongo is None else ["-m", mongo]
    what = ["with", *cell.arguments()] if checkpoint is None else [f"resume={checkpoint}"]
    return [sys.executable, tied.__file__, cell.module, *option, *what]


def find_checkpoint(cell: Cell, run_ids: Sequence[Any]) -> Path | None:
    """The folder of the first of these runs that has left a checkpoint of this cell here."""
    for run_id in run_ids:
        folder = Path(str(cell.settings.get("output", "runs"))) / str(run_id)
        config = folder / CONFIG
        # another database's run may have the same number
        if (folder / STATE).is_file() and config.is_file():
            if json.loads(config.read_text()).get("cell") == cell.identity:
                return folder
    return None


class _Training:
    """The process of one cell; it dies with this one.

    Args:
        lock: descriptor of the lock's file, which counts as held while this lives.
    """

    def __init__(self, words: Sequence[str], log: Path, lock: int) -> None:
        self._log = log
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            self._start = output.tell()
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment(),
                pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)

    def wait(self, seconds: float) -> int | None:
        """The exit status, None if it still runs after this time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """SIGTERM, SIGKILL to what has not ended after `GRACE`."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            if self.wait(GRACE) is not None:
                return

    def explain(self) -> tuple[str, str]:
        """How it ended without completing: a signal is a death from outside, no failure."""
        status = self._process.returncode
        number = -status if status < 0 else status - 128
        if number in set(signal.Signals):
            return INTERRUPTED, f"killed by {signal.Signals(number).name}"
        if status == 0:
            return FAILED, "it ended well, but no completed run of this cell is in the database"
        return FAILED, f"exit status {status}: {self._last_line()}"

    def _last_line(self) -> str:
        with open(self._log, "rb") as file:
            file.seek(max(self._start, self._log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it printed nothing"])[-1]
