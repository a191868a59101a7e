"""The runs of a database or of exported files, and how they differ."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import count, groupby
from typing import Any

from experiments.sweeps.runs import Run, setting_text
from experiments.tracking.records import Records, RunId

MOST_PARTS = 6
"""Files and packages that a line about other code names."""


class Archive:
    """What a database or files have.

    Attributes:
        runs: by number; those with other names come last.
        by_cell: the same, by the identity of the sweep's cell that they are.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.runs = [Run(document) for document in records.runs]
        self.by_cell: dict[str, list[Run]] = {}
        for run in self.runs:
            self.by_cell.setdefault(str(run.settings.get("cell")), []).append(run)

    def load(self, runs: Iterable[Run], names: Sequence[str] | None = None) -> None:
        """Fetch these metrics of all these runs at once, or all their metrics."""
        by_id = {run.id: run for run in runs}
        for number, name, series, fault in self._records.metrics(by_id, names):
            by_id[number].metrics[name] = series
            by_id[number].fault(fault)

    def of_experiment(self, name: str) -> list[Run]:
        """The runs of one experiment."""
        return [run for run in self.runs if run.experiment == name]


def unequal(tables: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all of these tables, with the values it takes."""
    tables = list(tables)
    values = {name: dict.fromkeys(setting_text(t[name]) if name in t else "not set" for t in tables)
              for name in sorted({name for table in tables for name in table})}  # fmt: skip
    return {name: list(found) for name, found in values.items() if len(found) > 1}


def difference_lines(label: str, runs: Sequence[Run]) -> list[str]:
    """A line for each way in which the runs of one mean differ, none if they do not."""
    by_code: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_code.setdefault(run.code.signature, []).append(run)
    lines = [_code_line(label, list(by_code.values()))] if len(by_code) > 1 else []
    if settings := unequal(run.compared for run in runs):
        told = "; ".join(f"{name} = {' or '.join(values)}" for name, values in settings.items())
        lines.append(f"{label}: settings differ between its runs: {told}")
    hosts = sorted({run.host for run in runs})
    if len(hosts) > 1:
        lines.append(f"{label}: on {len(hosts)} machines ({', '.join(hosts)}); times may differ")
    return lines


def _code_line(label: str, groups: Sequence[Sequence[Run]]) -> str:
    """Who was run by which code, and the files and packages that differ."""
    versions = ", ".join(f"run{'s' * (len(same) > 1)} {run_list(run.id for run in same)}"
                         f" by {same[0].code}" for same in groups)  # fmt: skip
    codes = [same[0].code for same in groups]
    parts = [*unequal(c.sources for c in codes), *unequal(c.packages for c in codes)]
    parts = parts or ["the commit or its uncommitted changes (no source file is recorded)"]
    more = f" and {len(parts) - MOST_PARTS} more" if len(parts) > MOST_PARTS else ""
    return f"{label}: code differs: {versions}; in {', '.join(parts[:MOST_PARTS])}{more}"


def run_list(ids: Iterable[RunId]) -> str:
    """``1-3, 7`` for runs 1, 2, 3 and 7; names as they are."""
    ids = set(ids)
    numbers, place = sorted(i for i in ids if isinstance(i, int)), count()
    spans = [list(span) for _, span in groupby(numbers, key=lambda n: n - next(place))]
    texts = [f"{s[0]}-{s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans]
    return ", ".join([*texts, *sorted(i for i in ids if isinstance(i, str))])
