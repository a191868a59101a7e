"""The runs of a database or of files, in numbers, and how they differ; the cells of the sweeps that
they fill; and what a report is asked for. Nothing is chosen or written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import count, groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.statistics import Mean, seeds_mean
from experiments.sweeps.definition import PENDING, Cell, Settings, Sweep, describe, format_value
from experiments.sweeps.listing import Status, recorded
from experiments.sweeps.plan import Group, best, make_plan
from experiments.sweeps.runs import Run
from experiments.tracking.records import Records, RunId

DROP = 0.10
"""A validation score that is by more than this below the best one before has collapsed."""

SCORES = ("accuracy", "mse")
METRICS = tuple(
    f"{when}/{what}"
    for when in ("validation", "test")
    for what in (*SCORES, "half_width", "training_seconds")
)
AVERAGED = ("test", "early_stopped", "validation", "within_run", "step_cpu_seconds", "iterations")
"""Of a `Summary`, over seeds."""

NOT_CHOSEN = "its grid is not complete"
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


class Summary:
    """A complete run; scores are accuracies in [0, 1], or mean squared errors; nan: not recorded.

    Its `points` are all validations: ``iteration``, ``seconds`` of training until then, ``score``,
    ``half_width``; `within` are those in the budget, the one at its end included.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.score = score_of(run)
        self.test = run.number(f"result.test_{self.score}")
        self.within_run = run.number("result.test_half_width")
        # of theta at the best validation
        self.early_stopped = run.number(f"result.early_stopped_{self.score}")
        # median and peak of an outer step
        self.step_cpu_seconds = run.number("result.step_cpu_seconds")
        self.tensor_bytes = run.number("result.step_peak_bytes")
        self.diverged = str(run.result.get("diverged") or "")  # why

        budget = run.number("config.budget") or math.nan
        steps, scores = run.series(f"validation/{self.score}")
        self.points = pd.DataFrame({"iteration": steps, "score": np.array(scores, dtype=float)})
        for name, metric in (("seconds", "training_seconds"), ("half_width", "half_width")):
            values = dict(zip(*run.series(f"validation/{metric}"), strict=True))
            self.points[name] = [values.get(step, math.nan) for step in steps]
        spent = (self.points["seconds"] >= budget).cummax()
        self.within = self.points[~spent.shift(fill_value=False)]
        finite = self.within["score"][np.isfinite(self.within["score"])]
        self.validation = float(finite.min() if self.score == "mse" else finite.max())
        # whether a score is more than `DROP` below the best before it
        best = self.within["score"].cummax().ffill().shift()
        fell = bool((self.within["score"] < best - DROP).any())
        self.collapsed = self.score == "accuracy" and fell
        self.tests = dict(zip(*run.series(f"test/{self.score}"), strict=True))  # by iteration
        # a run with test_at goes on after its budget
        spent_at = zip(*run.series("test/training_seconds"), strict=True)
        known = [run.number("result.iterations"), *map(float, steps[-1:])]
        self.iterations = min(
            (float(step) for step, seconds in spent_at if seconds >= budget),
            default=next((number for number in known if not math.isnan(number)), math.nan),
        )


def score_of(run: Run) -> str:
    """What it was tested by."""
    return next((name for name in SCORES if f"test_{name}" in run.result), SCORES[0])


def mean_record(runs: Sequence[Summary], **more: Mean) -> dict[str, Any]:
    """What is known of runs of equal code and settings together: means over seeds, and counts."""
    means = {name: seeds_mean([getattr(run, name) for run in runs]) for name in AVERAGED} | more
    return {
        "seeds": len(runs),
        "runs": run_list(run.run.id for run in runs),
        "collapsed": sum(run.collapsed for run in runs),
        "diverged": sum(bool(run.diverged) for run in runs),
        "tensor_bytes": max((run.tensor_bytes for run in runs if math.isfinite(run.tensor_bytes)),
                            default=math.nan),
        **{f"{name}_mean": mean.mean for name, mean in means.items()},
        **{f"{name}_half_width": mean.half_width for name, mean in means.items()},
        **{f"{name}_seeds": mean.number for name, mean in means.items()},
    }


def unequal(tables: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all of these tables, with the values it takes."""
    tables = list(tables)
    values = {name: dict.fromkeys(format_value(t[name]) if name in t else "not set" for t in tables)
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


class MethodState:
    """One row of a sweep's table.

    Attributes:
        setting: of the candidate that the sweep decides for, or, where it cannot yet, that has
            final runs; empty without a grid.
        remark: how that was decided, where it was not by a complete grid.
        runs: the complete final runs that count, by seed.
    """

    def __init__(self, group: Group, by_cell: Mapping[str, Sequence[Run]]) -> None:
        def states(cells: Mapping[str, Cell]) -> list[Status]:
            return [recorded(name, cell, by_cell.get(cell.identity, ()))
                    for name, cell in cells.items()]  # fmt: skip

        self.name, self.grid = group.name, states(group.grid)
        finals = [states(cells) for cells in group.finals]
        counts = [sum(cell.run is not None for cell in cells) for cells in finals]
        chosen = counts.index(max(counts)) if max(counts) else None
        self.remark = "Final runs are there, but not all of the grid" if max(counts) else ""
        scores = [cell.run.last_validation for cell in self.grid if cell.run is not None]
        if len(scores) == len(self.grid):
            chosen, self.remark = best(scores) if scores else 0, ""
        unknown = [Status(n, None, PENDING, None, NOT_CHOSEN) for n in group.final_names()]
        self.finals = unknown if chosen is None else finals[chosen]
        self.runs = [cell.run for cell in self.finals if cell.run is not None]
        self.setting = NOT_CHOSEN if chosen is None else describe(group.candidates[chosen])


class SweepState:
    """A sweep on one benchmark, with further KEY=VALUE of its command line.

    Raises:
        UserError: KEY=VALUE that the sweep does not take.
    """

    def __init__(
        self, name: str, sweep: Sweep, benchmark: str, given: Settings, archive: Archive
    ) -> None:
        self.name, self.benchmark = name, benchmark
        self.published = sweep.published.get(benchmark, {})
        plan = make_plan(sweep, {**given, "benchmark": benchmark})
        self.methods = [MethodState(group, archive.by_cell) for group in plan.groups]
        grids = [cell for method in self.methods for cell in method.grid]
        self.cells = grids + [cell for method in self.methods for cell in method.finals]
        self.attempts = [run for cell in self.cells for run in cell.runs]
        self.runs = [run for method in self.methods for run in method.runs]  # that count
        self.regression = {score_of(run) for run in self.runs} == {"mse"}  # without accuracies
        elsewhere = any("tasks.root=DATA" in run.command.split() for run in self.attempts)
        shown = {"benchmark": benchmark} if len(sweep.benchmarks) > 1 else {}
        shown |= {"tasks.root": "DATA"} if elsewhere else {}
        shown |= {key: value for key, value in given.items() if key != "benchmark"}
        self._words = [name, *(f"{key}={format_value(value)}" for key, value in shown.items())]

    def command(self, *only: str) -> str:
        """What runs the sweep, or with ``--cell``, NAME one cell of it."""
        return shlex.join(["python", "-m", "experiments.sweep", *self._words, *only])


class Request(NamedTuple):
    """What every section gets."""

    archive: Archive
    sweeps: Sequence[SweepState] = ()  # those asked for, on each benchmark
