"""Draw every table and figure from the database.

    python -m experiments.report
    python -m experiments.report accuracy benchmark=caltech101 --output report
    python -m experiments.report --records docs/records/*.jsonl.gz

Reads MongoDB (the database that experiments.train records in, or -m's) or files of exported runs,
and nothing else. Words are a sweep's name (those of experiments.sweep, or a Python file that
defines SWEEP) and the KEY=VALUE that it was run with; without any, every sweep. What the report
shows: docs/report.md.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from experiments.report import listing, open_records, papers, sweeps
from experiments.report.content import Section
from experiments.report.summary import METRICS, Archive, Request, SweepState
from experiments.report.write import write
from experiments.sweeps.definition import parse_settings
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import find_sweep
from experiments.tracking import UserError, wrong
from experiments.tracking.errors import CommandLine, command

SECTIONS: tuple[Callable[[Request], list[Section]], ...] = (
    listing.overview,
    listing.trainings,
    sweeps.sections,
    papers.sections,
    listing.all_runs,
)
"""What the report shows, in this order; one that finds no run of its own returns an empty list."""


@command
def main(argv: Sequence[str] | None) -> int:
    """The command line."""
    options = _parse(argv)
    if not options.output:
        raise wrong("--output", "the name of a folder", "''")
    with open_records(options.mongo_db, options.records) as records:
        archive = Archive(records)
        archive.load([run for run in archive.runs if run.complete], METRICS)
        request = Request(archive, _sweeps(options.words, archive))
        sections = [section for make in SECTIONS for section in make(request)]
    about = f"From {records.label}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    given = ["--records", *options.records] if options.records else []
    shown = shlex.join(["python", "-m", "experiments.report", *options.words, *given])
    path = write(Path(options.output), sections, about, shown)
    print(f"report           {path}", flush=True)
    return 0


def _sweeps(words: Sequence[str], archive: Archive) -> list[SweepState]:
    names = [word for word in words if "=" not in word]
    settings = parse_settings([word for word in words if "=" in word])
    if settings and len(names) != 1:
        raise UserError(
            f"KEY=VALUE needs one sweep that it was given to, got {len(names)} names; name that one"
        )
    found = {name: find_sweep(name) for name in names or SWEEPS}
    return [
        SweepState(name, sweep, benchmark, settings, archive)
        for name, sweep in found.items()
        for benchmark in ([str(settings["benchmark"])] if "benchmark" in settings
                          else sweep.benchmarks)
    ]  # fmt: skip


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = CommandLine("report", "Tables and figures from the database.")
    add = parser.add_argument
    add("words", nargs="*", metavar="SWEEP | KEY=VALUE",
        help="a sweep's name and what it was run with; default: every sweep")
    add("--output", default="report", metavar="FOLDER", help="for all files (default: report)")
    add("--records", nargs="+", metavar="FILE",
        help="of exported runs, read instead of the database (experiments.tracking.export)")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
