"""Run many settings of one experiment, on one machine or several, and only those missing.

    python -m experiments.sweep accuracy benchmark=caltech101 tasks.root=DATA
    python -m experiments.sweep accuracy benchmark=caltech101 --list
    python -m experiments.sweep accuracy benchmark=caltech101 --print | parallel -j 8

The sweeps are defined in experiments/sweeps/definitions.py; a file of one's own that defines
SWEEP stands in place of a name. What each option does: docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import extra  # noqa: F401  (first: it says what to install)

# isort: split
from pymongo.errors import PyMongoError

from experiments.sweeps import listing
from experiments.sweeps.board import DONE, FAILED, RUNNING, Board, Status
from experiments.sweeps.cells import parse_settings
from experiments.sweeps.claims import Claims
from experiments.sweeps.coordinator import Coordinator
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.dry_run import check_settings
from experiments.sweeps.plan import Plan, find_sweep, make_plan
from experiments.sweeps.records import Records
from experiments.sweeps.worker import Stopped, Worker
from experiments.tracking import UserError
from experiments.tracking.database import Database, choose


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if nothing failed, 1 after a failure, 128 + signal if stopped."""
    options = _parse(argv)
    try:
        plan = make_plan(find_sweep(options.name), parse_settings(options.settings))
        if options.cell:
            plan = plan.only(options.cell)
        if options.dry_run:
            return check_settings(plan)
        database = Database(choose(options.mongo_db))
        try:
            status = _run(plan, options, database)
            sys.stdout.flush()
            return status
        finally:
            database.close()
    except (UserError, PyMongoError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return 128 + stopped.signum
    except BrokenPipeError:  # whoever read the list has seen enough: `--list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description="Run the missing cells of a sweep."
    )
    add = parser.add_argument
    add("name", help=f"{', '.join(SWEEPS)}, or a Python file that defines SWEEP")
    add("settings", nargs="*", metavar="KEY=VALUE",
        help="benchmark=NAME, seeds=N, grid=NAME, methods=A,B, or a setting of every run")
    add("--list", action="store_true", help="show every cell and what is known of it")
    add("--print", action="store_true", help="print one command a line for another engine")
    add("--dry-run", action="store_true", help="check every method's settings, run nothing")
    add("--workers", type=int, default=_cores(), metavar="N", help="processes (default: cores)")
    add("--redo-changed", action="store_true", help="run again what other code has run")
    add("--retry-failed", action="store_true", help="run again what has failed twice")
    add("--cell", metavar="NAME", help="run only this cell, and the grid it needs")
    add("-m", "--mongo_db", metavar="HOST:PORT:DB", help="as in experiments.train")
    add("--worker", metavar="TOKEN", help=argparse.SUPPRESS)
    add("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(plan: Plan, options: argparse.Namespace, database: Database) -> int:
    records, claims = Records(database), Claims(database)
    records.index()

    def make_board(records: Records, claims: Claims) -> Board:
        return Board(plan, records, claims, options.redo_changed)

    board = make_board(records, claims)
    if options.worker or options.cell:
        log = options.log or _folder(options) / f"{platform.node()}-{os.getpid()}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        worker = Worker(database, make_board, log, options.mongo_db, options.worker)
        statuses = worker.work(without=options.cell)
        return _report_cell(statuses, options.cell, log) if options.cell else 0
    statuses = board.look()
    if options.retry_failed and not (options.list or options.print):
        claims.forgive(s.cell.identity for s in statuses if s.cell is not None)
        statuses = board.look()
    if options.print:
        print("\n".join(_lines(options, statuses)))
        return 0
    return _sweep(board, claims, database, options, statuses)


def _sweep(board: Board, claims: Claims, database: Database, options: argparse.Namespace,
           statuses: list[Status]) -> int:
    """Show what there is to do, do it, show what has come of it."""
    if options.workers < 1:
        raise UserError(f"--workers: expected at least 1, got {options.workers}")
    open_cells = [s for s in statuses if s.state not in (DONE, FAILED)]
    workers = max(1, min(options.workers, len(open_cells)))
    print("\n".join(listing.table(board.plan, statuses)))
    if open_cells and not options.list:
        print(listing.summary(board.plan, statuses, workers), flush=True)
        arguments = _same_plan(options)
        coordinator = Coordinator(
            board, claims, database, arguments, _folder(options), workers
        )
        statuses = coordinator.run()
    print("\n".join([*listing.choices(board.choices),
                     listing.summary(board.plan, statuses, workers)]))
    if options.list:
        return 0
    return _report_failures(statuses, _folder(options))


def _report_failures(statuses: list[Status], folder: Path) -> int:
    failed = [status for status in statuses if status.state == FAILED]
    for status in failed:
        print(f"error: {listing.finished(status)}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} cells failed; their output is in {folder},"
              " --retry-failed runs them again", file=sys.stderr)
    return 1 if any(status.state != DONE for status in statuses) else 0


def _report_cell(statuses: list[Status], name: str, log: Path) -> int:
    """0 if the cell is done, or somebody else runs it; the grid it needs was waited for."""
    status = {status.name: status for status in statuses}[name]
    print(f"{status.state}: {listing.finished(status)}; log {log}")
    return 0 if status.state in (DONE, RUNNING) else 1


def _same_plan(options: argparse.Namespace) -> list[str]:
    """The arguments that give another process this plan and database."""
    words = [options.name, *options.settings]
    words += ["-m", options.mongo_db] if options.mongo_db else []
    return words + (["--redo-changed"] if options.redo_changed else [])


def _lines(options: argparse.Namespace, statuses: list[Status]) -> list[str]:
    command = ["python", "-m", "experiments.sweep", *_same_plan(options), "--cell"]
    names = [s.name for s in statuses if s.state not in (DONE, FAILED)]
    return [shlex.join([*command, name]) for name in names]


def _folder(options: argparse.Namespace) -> Path:
    return Path("runs") / "sweeps" / Path(options.name).stem


if __name__ == "__main__":
    sys.exit(main())
