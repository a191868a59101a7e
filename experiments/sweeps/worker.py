"""A worker: claim a cell, run it, claim the next, until nothing is left to do."""

from __future__ import annotations

import logging
import shlex
import signal
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pymongo.errors import PyMongoError

from experiments.sweeps.board import DONE, OPEN, RUNNING, Board, Status
from experiments.sweeps.claims import Claims, Owner
from experiments.sweeps.records import Records
from experiments.sweeps.training import Training, command, find_checkpoint, is_death
from experiments.tracking import UserError
from experiments.tracking.database import Database
from experiments.tracking.embedded import data_folder
from experiments.tracking.uploader import upload_abandoned

POLL = 1.0
Answer = TypeVar("Answer")


class Stopped(Exception):
    """SIGTERM, SIGINT or SIGHUP reached this process.

    Args:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Worker:
    """Runs cells of a board, one at a time.

    Args:
        database: where claims and runs are.
        make_board: the cells and their states, as seen with this worker's claims.
        log: file for its own lines and what the trainings print.
        mongo: value of Sacred's -m, for the trainings.
        token: of its claims; a new one by default.
    """

    def __init__(self, database: Database, make_board: Callable[[Records, Claims], Board],
                 log: Path, mongo: str | None = None, token: str | None = None) -> None:
        self._owner = Owner(token or uuid.uuid4().hex)
        self._database, self._log, self._mongo = database, log, mongo
        self._claims = Claims(database, self._owner.token)
        self._records = Records(database)
        self.board = make_board(self._records, self._claims)
        self._logger = _file_logger(log)
        self._held: str | None = None
        self._signal = 0

    def work(self, without: str | None = None) -> list[Status]:
        """Run what can be run; the states at the end.

        Cells that others run are waited for, and taken over if their worker dies.

        Args:
            without: name of a cell that is not waited for.

        Raises:
            Stopped: by a signal, after the training has ended and the cell was given back.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            while True:
                statuses = self._patiently(self.board.look)
                if not self._run_one(statuses):
                    if not any(_is_open(status, without) for status in statuses):
                        return statuses
                    self._pause()
        finally:
            self._owner.close(released=self._held is None)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._signal = signum

    def _run_one(self, statuses: list[Status]) -> bool:
        """Run the first cell that can be had; whether there was one."""
        for status in statuses:
            self._check_signal()
            if status.cell is not None and self._patiently(partial(self._claim, status)):
                self._held = status.cell.identity
                self._run(status)
                return True
        return False

    def _claim(self, status: Status) -> bool:
        if status.cell is None:
            return False
        if status.state == OPEN:
            return self._claims.take(status.cell.identity, status.name)
        return status.state == RUNNING and self._claims.take_over(status.claim)

    def _run(self, status: Status) -> None:
        """Run the claimed cell, unless it has been completed meanwhile, and give it back."""
        if status.cell is None:
            return
        self._patiently(self._upload)
        if self._is_done(status):
            self._give_back(None)
            return
        words = command(status.cell, self._mongo, self._checkpoint(status))
        self._logger.info("%s: %s", status.name, shlex.join(words))
        training = Training(words, self._log, self._owner.descriptor)
        lost = self._watch(training, status.cell.identity)
        if lost:
            self._logger.warning("%s: stopped, since %s", status.name, lost)
            self._held = None
        elif self._signal:
            self._give_back(None)
        else:
            self._judge(status, training)
        self._check_signal()

    def _checkpoint(self, status: Status) -> Path | None:
        """Where a stopped run of the cell may go on; after an error it starts anew."""
        if status.cell is None or any(not is_death(reason) for reason in status.failures):
            return None
        stopped = self._patiently(partial(self._records.unfinished, status.cell.identity))
        return find_checkpoint(status.cell, stopped)

    def _upload(self) -> None:
        """What a killed run of this machine has left may be the end of this very cell."""
        upload_abandoned(self._database, data_folder("journals"), self._logger)

    def _is_done(self, status: Status) -> bool:
        if status.cell is None:
            return False
        look = partial(self.board.look_at, status.name, status.cell)
        return self._patiently(look).state == DONE

    def _watch(self, training: Training, identity: str) -> str:
        """Until the training ends, or is stopped; why the claim was lost, empty if it was not."""
        interval = min(POLL, self._claims.lease / 10)
        beaten = time.monotonic()
        while training.wait(interval) is None:
            now = time.monotonic()
            try:
                held = self._claims.beat(identity)
                beaten = now
            except PyMongoError:
                held = True
                self._revive()
            late = time.monotonic() - beaten > 0.8 * self._claims.lease
            if self._signal or late or not held:
                training.stop()
            if late or not held:
                return "another worker has taken it" if not held else "the database is away"
        return ""

    def _judge(self, status: Status, training: Training) -> None:
        self._patiently(self._upload)
        if self._is_done(status):
            self._logger.info("%s: done", status.name)
            self._give_back(None)
            return
        reason = training.reason()
        if training.process.returncode == 0:
            reason = "it ended well, but no completed run of this cell is in the database"
        self._logger.warning("%s: %s", status.name, reason)
        self._give_back(reason)

    def _give_back(self, failure: str | None) -> None:
        held = self._held
        if held is not None and failure is None:
            self._patiently(partial(self._claims.release, held))
        elif held is not None and failure is not None:
            self._patiently(partial(self._claims.fail, held, failure))
        self._held = None

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """The answer, also from a database that is away for less than a lease."""
        deadline = time.monotonic() + self._claims.lease
        while True:
            try:
                return ask()
            except PyMongoError:
                if time.monotonic() > deadline or self._signal:
                    raise
                time.sleep(min(POLL, self._claims.lease / 10))
                self._revive()

    def _revive(self) -> None:
        try:
            self._database.revive()
        except UserError as error:
            self._logger.warning("%s", error)

    def _pause(self) -> None:
        time.sleep(min(POLL, self._claims.lease / 10))
        self._check_signal()

    def _check_signal(self) -> None:
        if self._signal:
            raise Stopped(self._signal)


def _is_open(status: Status, without: str | None) -> bool:
    """Whether to look again: somebody runs it, or was quicker than this process to claim it."""
    return status.state == OPEN or (status.state == RUNNING and status.name != without)


def _file_logger(path: Path) -> logging.Logger:
    """Lines with a time, appended to the file that the trainings print to."""
    logger = logging.getLogger(f"sweep.{path.name}")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
