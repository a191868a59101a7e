"""From the runs to tables, figures and one page: `python -m experiments.report`.

Read `summary` (the runs in numbers, and which cells of a sweep they fill), `listing`, `sweeps` and
`papers` (what is shown), `content` (tables and figures as data), `write` (as files); `get_results`
gives the runs as a pandas DataFrame. Nothing here trains, and nothing imports torch.
"""

from experiments import extra  # noqa: F401, I001  (first: it says what to install)

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from sacred.utils import iterate_flattened

from experiments.report.summary import Archive
from experiments.sweeps.runs import COMPLETED
from experiments.tracking.database import Database, choose
from experiments.tracking.records import DatabaseRecords, FileRecords, Records

__all__ = ["get_results"]

COLUMNS = ("_id", "experiment", "status", "start_time", "seconds", "host", "commit")


def get_results(
    experiment: str | None = None,
    *,
    states: str | Iterable[str] | None = (COMPLETED,),
    filter_dict: Mapping[str, Any] | None = None,
    database: str | None = None,
    records: str | Path | Iterable[str | Path] | None = None,
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
    wanted = None if states is None else {states} if isinstance(states, str) else set(states)
    files = [records] if isinstance(records, str | Path) else records
    with open_records(database, files) as found:
        archive = Archive(found)
        runs = [run for run in archive.runs if experiment in (None, run.experiment)
                and (wanted is None or run.status in wanted)]  # fmt: skip
        archive.load(runs)
    rows = []
    for run in runs:
        own = run.id, run.experiment, run.status, run.started, run.seconds, run.host
        values = {
            **dict(zip(COLUMNS, (*own, run.code.commit), strict=True)),
            **{f"config.{key}": value for key, value in run.settings.items()},
            **{f"result.{key}": value for key, value in iterate_flattened(run.result)},
            **{f"metrics.{name}": series.values[-1] if series.values else float("nan")
               for name, series in run.metrics.items()},
        }  # fmt: skip
        if dict(filter_dict or {}).items() <= values.items():
            rows.append(values)
    return pd.DataFrame(rows, columns=None if rows else list(COLUMNS))


@contextmanager
def open_records(database: str | None, files: Iterable[str | Path] | None) -> Iterator[Records]:
    """Of the files, where any are named; else of the database."""
    if files is not None:
        yield FileRecords(files)
        return
    with closing(Database(choose(database))) as opened:
        yield DatabaseRecords(opened.documents, label=opened.label)
