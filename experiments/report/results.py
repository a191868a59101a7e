"""Runs as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.report.runs import COMPLETED, Run, flatten, read_run
from experiments.tracking.database import Database, choose
from experiments.tracking.records import DatabaseRecords, FileRecords, Records


def get_results(
    experiment: str | None = None,
    *,
    states: Iterable[str] | None = (COMPLETED,),
    filter_dict: Mapping[str, Any] | None = None,
    database: str | None = None,
    records: Iterable[str | Path] | None = None,
) -> pd.DataFrame:
    """The runs of a database, or of exported files, a row each; as SEML's function of this name.

    Columns: ``_id``, ``experiment``, ``status``, ``start_time``, ``seconds`` from start to end,
    ``host``, ``commit``, then ``config.NAME`` and ``result.NAME`` with dotted names, and
    ``metrics.NAME`` with each metric's last value. What a run does not have is missing (nan).

    Args:
        experiment: such as "train"; None: every experiment.
        states: Sacred's words COMPLETED, RUNNING, FAILED, INTERRUPTED; None: all.
        filter_dict: columns and the values that they must have.
        database: HOST:PORT:DB; None: the one that experiments.train records in.
        records: files that `experiments.tracking.export` wrote, read instead of a database.

    Raises:
        UserError: the database does not answer, or a file is none; one line.

    Example:
        >>> runs = get_results("memory", records=["docs/records/papers_figures.jsonl.gz"])
        >>> runs[["_id", "status", "config.hidden", "metrics.memory/supervised"]]
           _id     status  config.hidden  metrics.memory/supervised
        0    1  COMPLETED             64                   52429320
    """
    with open_records(database, records) as found:
        runs = [read_run(document) for document in found.runs]
        if experiment is not None:
            runs = [run for run in runs if run.experiment == experiment]
        if states is not None:
            wanted = set(states)
            runs = [run for run in runs if run.status in wanted]
        rows = {run.id: _row(run) for run in runs}
        for run, name, series, _ in found.metrics(rows):
            rows[run][f"metrics.{name}"] = series.values[-1] if series.values else float("nan")
    kept = [row for row in rows.values() if _fits(row, filter_dict or {})]
    return pd.DataFrame(kept, columns=None if kept else list(_row_names()))


@contextmanager
def open_records(
    database: str | None, files: Iterable[str | Path] | None
) -> Iterator[Records]:
    """Of the files, where any are named; else of the database."""
    if files is not None:
        yield FileRecords(files)
        return
    opened = Database(choose(database))
    try:
        yield DatabaseRecords(opened.documents, label=opened.label)
    finally:
        opened.close()


def _row(run: Run) -> dict[str, Any]:
    return {
        "_id": run.id,
        "experiment": run.experiment,
        "status": run.status,
        "start_time": run.started,
        "seconds": run.seconds,
        "host": run.host,
        "commit": run.code.commit,
        **{f"config.{key}": value for key, value in run.settings.items()},
        **{f"result.{key}": value for key, value in flatten(run.result).items()},
    }


def _row_names() -> Iterable[str]:
    return ("_id", "experiment", "status", "start_time", "seconds", "host", "commit")


def _fits(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in wanted.items())
