"""Several workers on this machine: started, replaced when they die, stopped together."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pymongo.errors import PyMongoError
from tqdm import tqdm

from experiments.sweeps import listing
from experiments.sweeps.board import DONE, FAILED, Board, Status
from experiments.sweeps.claims import Claims, has_ended
from experiments.sweeps.training import GRACE, bound_to, environment
from experiments.sweeps.worker import Stopped
from experiments.tracking import UserError
from experiments.tracking.database import Database

LOOK = 2.0
"""Seconds between two looks at the database."""
IDLE_DEATHS = 3
"""Workers that may die without a cell in their hands before no more are started."""


@dataclass
class Hired:
    """A worker's process and the token of its claims."""

    process: subprocess.Popen[bytes]
    token: str
    log: Path


class Coordinator:
    """Runs a board's cells with several worker processes.

    Args:
        board: the cells.
        claims: of the same database.
        database: of both.
        arguments: of ``python -m experiments.sweep`` that give a worker the same plan.
        folder: for the workers' logs.
        workers: how many.
    """

    def __init__(self, board: Board, claims: Claims, database: Database,
                 arguments: Sequence[str], folder: Path, workers: int) -> None:
        self._board, self._claims, self._database = board, claims, database
        self._arguments, self._folder, self._count = arguments, folder, workers
        self._hired: list[Hired] = []
        self._idle_deaths = 0
        self._told: dict[str, tuple[str, int]] = {}

    def run(self) -> list[Status]:
        """Until nothing is left to do; the states at the end.

        Raises:
            Stopped: by a signal, after all workers have ended.
            UserError: workers cannot be kept alive, or the database does not come back.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _raise_stopped)
        statuses = self._board.look()
        self._told = {s.name: (s.state, len(s.failures)) for s in statuses}
        self._folder.mkdir(parents=True, exist_ok=True)
        form = "{n_fmt}/{total_fmt} cells |{bar:20}| {elapsed}{postfix}"
        try:
            with tqdm(total=len(statuses), bar_format=form) as bar:
                for _ in range(self._count):
                    self._hire()
                return self._oversee(bar)
        finally:
            self._stop()

    def _oversee(self, bar: tqdm[NoReturn]) -> list[Status]:
        away_since: float | None = None
        while True:
            try:
                self._replace_the_dead()
                statuses = self._board.look()
                self._tell(bar, statuses)
                away_since = None
                if not self._hired:
                    return statuses
            except PyMongoError as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > 2 * self._claims.lease:
                    raise UserError(f"the database does not come back: {error}") from None
                with suppress(UserError):  # not yet: the next look tries again
                    self._database.revive()
            self._pause()

    def _pause(self) -> None:
        """Until the next look; the end of a worker is seen at once."""
        deadline = time.monotonic() + LOOK
        while time.monotonic() < deadline:
            if not self._hired or any(h.process.poll() is not None for h in self._hired):
                return
            time.sleep(0.1)

    def _hire(self) -> None:
        token = uuid.uuid4().hex
        log = self._folder / f"{platform.node()}-{token[:8]}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.sweep", *self._arguments,
                 "--worker", token, "--log", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                start_new_session=True,  # Ctrl-C reaches the coordinator alone
                preexec_fn=bound_to(os.getpid()),
            )
        self._hired.append(Hired(process, token, log))

    def _replace_the_dead(self) -> None:
        for hired in [h for h in self._hired if h.process.poll() is not None]:
            if hired.process.returncode != 0:
                self._bury(hired)
                self._hire()
            self._hired.remove(hired)

    def _bury(self, hired: Hired) -> None:
        """A worker's death is a failure of the cell it held; without one, something is wrong."""
        deadline = time.monotonic() + GRACE
        while has_ended(hired.token, platform.node()) is False and time.monotonic() < deadline:
            time.sleep(0.05)  # the kernel is ending its training
        if not self._claims.bury(hired.token, "its worker was killed"):
            self._idle_deaths += 1
        if self._idle_deaths >= IDLE_DEATHS:
            raise UserError(f"workers keep dying; the last one's log is {hired.log}")

    def _tell(self, bar: tqdm[NoReturn], statuses: list[Status]) -> None:
        """A line for each cell that has ended or failed since the last look."""
        for status in statuses:
            state, told = self._told[status.name]
            final = 1 if status.state == FAILED else 0
            for reason in status.failures[told : len(status.failures) - final]:
                bar.write(f"{status.name}: {reason}; it is tried again", file=sys.stdout)
            if status.state != state and status.state in (DONE, FAILED):
                bar.write(listing.finished(status), file=sys.stdout)
            self._told[status.name] = (status.state, len(status.failures))
        before, bar.n = bar.n, sum(status.state in (DONE, FAILED) for status in statuses)
        left = listing.remaining(self._board.plan, statuses, self._count)
        bar.set_postfix_str(left if bar.n < len(statuses) else "", refresh=False)
        if bar.n != before or sys.stderr.isatty():
            bar.refresh()

    def _stop(self) -> None:
        """SIGTERM to the workers that are left, SIGKILL to those that do not end."""
        for hired in self._hired:
            hired.process.terminate()
        deadline = time.monotonic() + 2 * GRACE
        for hired in self._hired:
            try:
                hired.process.wait(max(0.1, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, Stopped):
                hired.process.kill()
                hired.process.wait()


def _raise_stopped(signum: int, frame: object) -> NoReturn:
    raise Stopped(signum)
