"""The sweep's own process: what is missing goes to Dask, a task a cell, until nothing is left."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import dask
from distributed import Client, Future, KilledWorker, LocalCluster
from tqdm import tqdm

from experiments.sweeps import listing, run
from experiments.sweeps.definition import COMPLETED, INTERRUPTED, RUNNING
from experiments.sweeps.lock import token_of
from experiments.sweeps.records import Board, Status, patiently
from experiments.sweeps.tied import STOPS
from experiments.tracking import UserError
from experiments.tracking.database import Database

LOGGERS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
Answer = TypeVar("Answer")
POLL, LOOK = 0.2, 2.0
CONNECT = 10.0


class Stopped(Exception):
    """SIGTERM, SIGINT or SIGHUP reached this process."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise `Stopped` within."""
    before = {number: signal.signal(number, _raise_stopped) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_stopped(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[Client]:
    """A client of the scheduler at this address, or of workers of its own on this machine.

    Raises:
        UserError: nothing answers there.
    """
    for name in LOGGERS:  # what they know is told here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address is not None:
        try:
            where = "scheduler_file" if address.endswith(".json") else "address"
            client = Client(**{where: address}, timeout=CONNECT)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"--scheduler: expected the address that `dask scheduler` prints, such as"
                f" tcp://HOST:8786, or its file, and a scheduler that answers; got {address!r}:"
                f" {error}"
            ) from None
        with client:
            yield client
        return
    # Else a place whose worker is killed twice, or is slow to start again, is given up after 15 s.
    dask.config.set({"distributed.deploy.lost-worker-timeout": "1000 days"})
    # Workers block what a terminal or a batch system sends to all: this process stops them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    resource_tracker.ensure_running()  # its start, now or at the first worker, unblocks two
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,
            security=True,  # else everybody on this machine could run code as this user
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
        client = Client(cluster)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with cluster, client:
        try:
            yield client
        except Stopped:
            _wait_for_trainings(client)
            raise


def _wait_for_trainings(client: Client) -> None:
    """Their tasks are cancelled: each brings its record home, if it is not slower than `GRACE`."""
    deadline = time.monotonic() + 2 * run.GRACE
    with suppress(Exception):  # a worker that dies meanwhile is not waited for
        while any(client.run(run.trains_here).values()) and time.monotonic() < deadline:
            time.sleep(POLL)


class Schedule:
    """Runs a board's cells by a Dask client.

    Args:
        board: the cells.
        database: of the board.
        client: of the scheduler that has the workers.
        mongo: Sacred's -m, for the workers.
        folder: for what the trainings print, on each worker's machine.
    """

    def __init__(self, board: Board, database: Database, client: Client, mongo: str | None,
                 folder: Path) -> None:
        self._board, self._database, self._client = board, database, client
        info = client.scheduler_info()
        self._address, self._scheduler = info["address"], info["id"]
        self._order = partial(run.Order, mongo=mongo, database=token_of(database),
                              scheduler=self._scheduler, redo=board.redo_changed)  # fmt: skip
        self._folder = folder
        self._futures: dict[str, Future] = {}
        self._had_workers = True

    def run(self) -> list[Status]:
        """Until nothing can be run any more; the states at the end.

        Raises:
            Stopped: by a signal; the trainings have been told to stop.
            UserError: the scheduler has gone.
        """
        form = "{n_fmt}/{total_fmt} cells |{bar:20}| {elapsed}{postfix}"
        statuses = self._look()
        told = {s.name: s.state for s in statuses}
        try:
            with tqdm(total=len(statuses), bar_format=form) as bar:
                while True:
                    self._submit(statuses)
                    self._show(bar, statuses, told)
                    if not self._futures and not any(s.state == RUNNING for s in statuses):
                        return statuses
                    self._wait()
                    statuses = self._look()
        except Stopped:
            self._ask(partial(self._client.cancel, list(self._futures.values())))
            raise

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (OSError, CancelledError):
            raise self._gone() from None

    def _gone(self) -> UserError:
        return UserError(
            f"the scheduler at {self._address} has gone; what is in the database stays, checkpoints"
            " too: start one, and the same command goes on"
        )

    def _look(self) -> list[Status]:
        return patiently(self._database, self._board.look)

    def _submit(self, statuses: Sequence[Status]) -> None:
        """What is missing, no other scheduler runs, and has not ended here without completing."""
        for status in statuses:
            cell = status.cell
            elsewhere = status.state == RUNNING and status.scheduler != self._scheduler
            if cell is None or status.state == COMPLETED or elsewhere:
                continue
            if cell.identity in self._futures or cell.identity in self._board.ended:
                continue
            log = self._folder / f"{status.name.replace('/', '-')}.log"
            self._futures[cell.identity] = self._client.submit(
                run.run_cell, self._order(cell=cell, log=str(log)), key=f"cell-{cell.identity}"
            )

    def _wait(self) -> None:
        """Until a cell ends, or for `LOOK` seconds; what has not completed goes to the board."""
        deadline, ended = time.monotonic() + LOOK, False
        while not ended and time.monotonic() < deadline:
            time.sleep(POLL)
            if self._client.status != "running":
                raise self._gone()
            for identity in [i for i, f in self._futures.items() if f.done()]:
                ended = True
                state, reason = self._ask(partial(_outcome, self._futures.pop(identity)))
                if state not in (COMPLETED, RUNNING):
                    self._board.ended[identity] = state, reason

    def _show(self, bar: tqdm[NoReturn], statuses: Sequence[Status], told: dict[str, str]) -> None:
        """A line for each cell that has ended since the last look, and the time left."""
        for status in statuses:
            over = status.cell is not None and status.cell.identity in self._board.ended
            if (over or status.run is not None) and told[status.name] != status.state:
                bar.write(listing.ended(status), file=sys.stdout)
                told[status.name] = status.state
        before, bar.n = bar.n, sum(s.state == COMPLETED for s in statuses)
        workers = sum(self._ask(self._client.nthreads).values())
        if not workers and self._had_workers:
            bar.write("no worker is connected; expected one that is started in the checkout:"
                      f" python -m dask worker {self._address}", file=sys.stdout)  # fmt: skip
        self._had_workers = bool(workers)
        bar.set_postfix_str(listing.remaining(statuses, workers), refresh=False)
        if bar.n != before or sys.stderr.isatty():
            bar.refresh()


def _outcome(future: Future) -> tuple[str, str]:
    if future.status == "finished":
        state, reason = future.result()
        return str(state), str(reason)
    if future.status == "error":
        error = future.exception()
        if isinstance(error, KilledWorker):
            return INTERRUPTED, f"its worker died {error.allowed_failures + 1} times"
        return INTERRUPTED, f"its worker says {type(error).__name__}: {error}"
    return RUNNING, ""
