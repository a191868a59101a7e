"""Run many settings of one experiment with Dask, on one machine or a cluster: those missing.

    python -m experiments.sweep accuracy benchmark=caltech101 tasks.root=DATA
    python -m experiments.sweep accuracy benchmark=caltech101 --list
    python -m experiments.sweep accuracy benchmark=caltech101 --scheduler tcp://HOST:8786
    python -m experiments.sweep accuracy benchmark=caltech101 --print | parallel -j 8

The sweeps are defined in experiments/sweeps/definitions.py; a file of one's own that defines
SWEEP stands in place of a name. What each option does: docs/sweeps.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NoReturn

from experiments import extra  # noqa: F401  (first: it says what to install)

# isort: split
import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, Security
from distributed.comm import connect
from pymongo.errors import PyMongoError
from tqdm import tqdm

from experiments.sweeps import listing, run
from experiments.sweeps.definition import COMPLETED, INTERRUPTED, RUNNING, parse_settings
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.listing import Board, Status
from experiments.sweeps.lock import token_of
from experiments.sweeps.plan import Plan, find_sweep, make_plan
from experiments.tracking import UserError, signals, wrong
from experiments.tracking.database import Database, choose
from experiments.tracking.errors import CommandLine, command, one_line
from experiments.tracking.uploader import upload_abandoned

LOGGERS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
POLL, LOOK, CONNECT = 0.2, 2.0, 10.0


@command
def main(argv: Sequence[str] | None) -> int:
    """The command line; 0 if all is completed, 1 if not."""
    options = _parse(argv)
    plan = make_plan(find_sweep(options.name), parse_settings(options.settings))
    if options.cell is not None:
        plan = plan.only(options.cell)
    if options.dry_run:
        return check_settings(plan)
    if options.workers is not None and (options.scheduler or options.workers < 1):
        raise wrong("--workers", "at least 1, and no --scheduler, whose workers are its own",
                    options.workers)
    with closing(Database(choose(options.mongo_db))) as database:
        return _sweep(plan, options, database)


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = CommandLine("sweep", "Run the missing cells of a sweep.")
    add = parser.add_argument
    add("name", help=f"{', '.join(SWEEPS)}, or a Python file that defines SWEEP")
    add("settings", nargs="*", metavar="KEY=VALUE",
        help="benchmark=NAME, seeds=N, grid=NAME, methods=A,B, or a setting of every run")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--list", action="store_true", help="show every cell and what is known of it")
    one("--print", action="store_true", help="print one command a line for another engine")
    one("--dry-run", action="store_true", help="check every method's settings, run nothing")
    add("--workers", type=int, metavar="N", help="processes here (default: one a core)")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster, instead of processes here")
    add("--redo-changed", action="store_true", help="run again what other code has run")
    add("--cell", metavar="NAME", help="run only this cell, and the grid it needs")
    return parser.parse_intermixed_args(argv)


def check_settings(plan: Plan) -> int:
    """Have one cell of every method and stage print its configuration; 1 if one is refused."""
    refused = 0
    stages = [cells for group in plan.groups for cells in (group.grid, group.finals[0])]
    for name, cell in [next(iter(cells.items())) for cells in stages if cells]:
        words = [sys.executable, "-m", cell.module, "print_config", "with", *cell.arguments()]
        answer = subprocess.run(words, env=run.environment(), capture_output=True, text=True)
        said = f"{run.last_line(answer.stdout + answer.stderr)}: {shlex.join(words)}"
        refused += answer.returncode != 0
        print(f"{name}: {said if answer.returncode else 'fine'}", flush=True)
    return 1 if refused else 0


def _sweep(plan: Plan, options: Namespace, database: Database) -> int:
    """Show what there is to do, do it, show what has come of it."""
    upload_abandoned(database, logging.getLogger("sweep"))
    board = Board(plan, database, options.redo_changed)
    statuses = board.look()
    missing = [status for status in statuses if status.state != COMPLETED]
    if options.print:
        words = ["python", "-m", "experiments.sweep", options.name, *options.settings]
        words += ["-m", options.mongo_db] if options.mongo_db else []
        words += ["--redo-changed"] if options.redo_changed else []
        for status in missing:
            print(shlex.join([*words, "--cell", status.name, "--workers", "1"]))
        return 0
    print("\n".join(listing.table(statuses)))
    workers = max(1, min(options.workers or CPU_COUNT, len(missing)))
    folder = Path("runs") / "sweeps" / Path(options.name).stem
    if missing and not options.list:
        print(listing.summary(statuses, workers))
        with connected(options.scheduler, workers) as client:
            print(f"dashboard: {client.dashboard_link}", flush=True)
            statuses = Schedule(board, client, options.mongo_db, folder).run()
    print("\n".join([*board.choices.values(), listing.summary(statuses, workers)]))
    missing = [status for status in statuses if status.state != COMPLETED]
    if options.list or not missing:
        return 0
    for status in missing:
        print(f"error: {listing.ended(status)}", file=sys.stderr)
    print(f"error: {len(missing)} of {len(statuses)} cells are missing; the same command runs"
          f" them again; what they printed is in {folder}", file=sys.stderr)
    return 1


def connected(address: str | None, workers: int) -> Client:
    """A client of the scheduler at this address, or of workers of its own on this machine."""
    for name in LOGGERS:  # what they know is told here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address is not None:
        try:
            # of a file that is not there Dask waits for ever
            file = address.endswith(".json") and not Path(address).is_fifo()
            at = str(json.loads(Path(address).read_text())["address"] if file else address)
            asyncio.run(_answers(at))
            return Client(at, timeout=CONNECT)
        except Exception as error:  # whatever answers there may answer nonsense
            expected = "the address that `dask scheduler` prints, tcp://HOST:PORT, or its file"
            got = f"{address!r} ({one_line(error)})"
            raise wrong("--scheduler", expected, got, "start one") from None
    # Else a place whose worker is killed twice, or is slow to start again, is given up after 15 s.
    # Its profiler and clock, at 100 and 50 Hz, would take 6 % of a core from each training.
    dask.config.set({"distributed.deploy.lost-worker-timeout": "1000 days",
                     "distributed.worker.profile.enabled": False,
                     "distributed.admin.tick.interval": "1s",
                     "scheduler-address": None})  # DASK_SCHEDULER_ADDRESS names another
    # Workers block what a terminal or a batch system sends to all: this process stops them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    resource_tracker.ensure_running()  # its start, now or at the first worker, unblocks two
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        # security: else everybody on this machine could run code as this user
        return Client(n_workers=workers, threads_per_worker=1, memory_limit=0, security=True,
                      dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _answers(address: str) -> None:
    """Or OSError; for the answer of a program that is silent Dask's client waits for ever."""
    options = Security().get_connection_args("client")
    async with asyncio.timeout(1.5 * CONNECT):
        await (await connect(address, timeout=CONNECT, **options)).close()


class Schedule:
    """What is missing on a board goes to Dask, a task a cell, until nothing is left.

    Workers read `mongo`, Sacred's -m, and keep what the trainings print in `folder`.
    """

    def __init__(self, board: Board, client: Client, mongo: str | None, folder: Path) -> None:
        self._board, self._client, self._mongo, self._folder = board, client, mongo, folder
        info = client.scheduler_info()
        self._address, self._scheduler = info["address"], info["id"]
        self._database = token_of(board.database)
        self._futures: dict[str, Future] = {}
        self._had_workers = True

    def run(self) -> list[Status]:
        """Until nothing can be run any more; the states at the end. UserError: no scheduler.

        KeyboardInterrupt: by a signal; the trainings have been told to stop.
        """
        form = "{n_fmt}/{total_fmt} cells |{bar:20}| {elapsed}{postfix}"
        statuses = self._board.look()
        told = {status.name: status.state for status in statuses}
        try:
            with tqdm(total=len(statuses), bar_format=form) as bar:
                while True:
                    self._submit(statuses)
                    self._show(bar, statuses, told)
                    if not self._futures and not any(s.state == RUNNING for s in statuses):
                        return statuses
                    self._wait()
                    statuses = self._board.look()
        except KeyboardInterrupt:
            with suppress(OSError, CancelledError):
                self._client.cancel(list(self._futures.values()))
            self._wait_for_trainings()
            raise
        except BrokenPipeError:
            raise
        except (OSError, CancelledError):
            raise UserError(
                f"the scheduler at {self._address} has gone; what is in the database stays,"
                " checkpoints too: start one, and the same command goes on"
            ) from None

    def _submit(self, statuses: Sequence[Status]) -> None:
        """What is missing, no other scheduler runs, and has not ended here without completing."""
        for status in statuses:
            cell = status.cell
            elsewhere = status.state == RUNNING and status.scheduler != self._scheduler
            if cell is None or status.state == COMPLETED or elsewhere:
                continue
            if cell.identity in self._futures or cell.identity in self._board.ended:
                continue
            log = str(self._folder / f"{status.name.replace('/', '-')}.log")
            order = run.Order(cell, self._mongo, self._database, self._scheduler, log,
                              self._board.redo_changed)
            key = f"cell-{cell.identity}"
            self._futures[cell.identity] = self._client.submit(run.run_cell, order, key=key)

    def _wait(self) -> None:
        """Until a cell ends, or for `LOOK` seconds; what has not completed goes to the board."""
        deadline, ended = time.monotonic() + LOOK, list[str]()
        while not ended and time.monotonic() < deadline:
            time.sleep(POLL)
            if self._client.status != "running":
                raise CancelledError
            ended = [identity for identity, f in self._futures.items() if f.done()]
        for identity in ended:
            state, reason = _outcome(self._futures.pop(identity))
            if state not in (COMPLETED, RUNNING):
                self._board.ended[identity] = state, reason

    def _show(self, bar: tqdm[NoReturn], statuses: Sequence[Status], told: dict[str, str]) -> None:
        """A line for each cell that has ended since the last look, and the time left."""
        left = []
        for status in statuses:
            over = status.cell is not None and status.cell.identity in self._board.ended
            if (over or status.run is not None) and told[status.name] != status.state:
                bar.write(listing.ended(status), file=sys.stdout)
                told[status.name] = status.state
            if not over or status.run is not None:
                left.append(status)
        before, bar.n = bar.n, sum(status.state == COMPLETED for status in statuses)
        workers = sum(self._client.nthreads().values())
        if not workers and self._had_workers:
            bar.write("no worker is connected; expected one that is started in the checkout:"
                      f" python -m dask worker {self._address}", file=sys.stdout)
        self._had_workers = bool(workers)
        bar.set_postfix_str(listing.remaining(left, workers), refresh=False)
        if bar.n != before or sys.stderr.isatty():
            bar.refresh()

    def _wait_for_trainings(self) -> None:
        """Workers of one's own end with this process: their trainings first bring records home."""
        deadline = time.monotonic() + 2 * run.GRACE
        while self._client.cluster is not None and time.monotonic() < deadline:
            with suppress(PyMongoError):  # away: trainings end without it too
                if not any(s.scheduler == self._scheduler for s in self._board.look_once()):
                    break
            time.sleep(POLL)


def _outcome(future: Future) -> tuple[str, str]:
    """State and reason, as `run.run_cell` gives them."""
    if future.status == "finished":
        return future.result()
    if future.status != "error":
        return RUNNING, ""
    error = future.exception()
    if isinstance(error, KilledWorker):
        return INTERRUPTED, f"its worker died {error.allowed_failures + 1} times"
    return INTERRUPTED, f"its worker says {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
