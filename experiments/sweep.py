"""Run many settings of one experiment with Dask, on one machine or a cluster: those missing.

    python -m experiments.sweep accuracy benchmark=caltech101 tasks.root=DATA
    python -m experiments.sweep accuracy benchmark=caltech101 --list
    python -m experiments.sweep accuracy benchmark=caltech101 --scheduler tcp://HOST:8786
    python -m experiments.sweep accuracy benchmark=caltech101 --print | parallel -j 8

The sweeps are defined in experiments/sweeps/definitions.py; a file of one's own that defines
SWEEP stands in place of a name. What each option does: docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from experiments import extra  # noqa: F401  (first: it says what to install)

# isort: split
from pymongo.errors import PyMongoError

from experiments.sweeps import listing
from experiments.sweeps.definition import COMPLETED, parse_settings
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import Plan, find_sweep, make_plan
from experiments.sweeps.records import Board, Status
from experiments.sweeps.run import environment
from experiments.sweeps.schedule import Schedule, Stopped, connected, stoppable
from experiments.tracking import UserError
from experiments.tracking.database import Database, choose
from experiments.tracking.embedded import data_folder
from experiments.tracking.uploader import upload_abandoned


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if all is completed, 1 if not, 128 + signal if stopped."""
    options = _parse(argv)
    try:
        plan = make_plan(find_sweep(options.name), parse_settings(options.settings))
        if options.cell:
            plan = plan.only(options.cell)
        if options.dry_run:
            return check_settings(plan)
        if options.workers is not None and (options.scheduler or options.workers < 1):
            raise UserError(f"--workers: expected at least 1, and no --scheduler, whose workers are"
                            f" its own; got {options.workers}")
        with closing(Database(choose(options.mongo_db))) as database, stoppable():
            status = _sweep(plan, options, database)
            sys.stdout.flush()
            return status
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
    add("--workers", type=int, metavar="N", help="processes here (default: one a core)")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster, instead of processes here")
    add("--redo-changed", action="store_true", help="run again what other code has run")
    add("--cell", metavar="NAME", help="run only this cell, and the grid it needs")
    add("-m", "--mongo_db", metavar="HOST:PORT:DB", help="as in experiments.train")
    return parser.parse_intermixed_args(argv)


def _sweep(plan: Plan, options: argparse.Namespace, database: Database) -> int:
    """Show what there is to do, do it, show what has come of it."""
    upload_abandoned(database, data_folder("journals"), logging.getLogger("sweep"))
    board = Board(plan, database, options.redo_changed)
    statuses = board.look()
    missing = [status for status in statuses if status.state != COMPLETED]
    if options.print:
        command = ["python", "-m", "experiments.sweep", *_same_plan(options), "--cell"]
        lines = [shlex.join([*command, status.name, "--workers", "1"]) for status in missing]
        print("\n".join(lines))
        return 0
    print("\n".join(listing.table(statuses)))
    workers = max(1, min(options.workers or _cores(), len(missing)))
    if missing and not options.list:
        print(listing.summary(statuses, workers))
        with connected(options.scheduler, workers) as client:
            print(f"dashboard: {client.dashboard_link}", flush=True)
            mongo, folder = options.mongo_db, _folder(options)
            statuses = Schedule(board, database, client, mongo, folder).run()
    print("\n".join([*listing.choices(board), listing.summary(statuses, workers)]))
    return 0 if options.list else _report_missing(statuses, _folder(options))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report_missing(statuses: Sequence[Status], folder: Path) -> int:
    missing = [status for status in statuses if status.state != COMPLETED]
    for status in missing:
        print(f"error: {listing.ended(status)}", file=sys.stderr)
    if missing:
        print(f"error: {len(missing)} of {len(statuses)} cells are missing; the same command runs"
              f" them again; what they printed is in {folder}", file=sys.stderr)
    return 1 if missing else 0


def _same_plan(options: argparse.Namespace) -> list[str]:
    """The arguments that give another process this plan and database."""
    words = [options.name, *options.settings]
    words += ["-m", options.mongo_db] if options.mongo_db else []
    return words + (["--redo-changed"] if options.redo_changed else [])


def _folder(options: argparse.Namespace) -> Path:
    return Path("runs") / "sweeps" / Path(options.name).stem


def check_settings(plan: Plan) -> int:
    """Have one cell of every method and stage print its configuration; 1 if one is refused."""
    refused = 0
    stages = [cells for group in plan.groups for cells in (group.grid, group.finals[0])]
    for name, cell in [next(iter(cells.items())) for cells in stages if cells]:
        command = [sys.executable, "-m", cell.module, "print_config", "with", *cell.arguments()]
        answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
        lines = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        wrong = f"{(reasons or ['it printed nothing'])[0]}: {shlex.join(command)}"
        refused += answer.returncode != 0
        print(f"{name}: {wrong if answer.returncode else 'fine'}", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
