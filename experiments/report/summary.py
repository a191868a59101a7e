"""Trainings in numbers, the cells of the sweeps that they fill, and what a report is asked for.

All from the runs alone: nothing is chosen or written.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.report.runs import Archive, run_list
from experiments.statistics import Mean, seeds_mean
from experiments.sweeps import definition
from experiments.sweeps.definition import Cell, Settings, Sweep, describe, format_value
from experiments.sweeps.plan import Group, best, make_plan
from experiments.sweeps.runs import Run, newest

DROP = 0.10
"""A validation score that is by more than this below the best one before has collapsed."""

SCORES = ("accuracy", "mse")
METRICS = tuple(
    f"{when}/{what}"
    for when in ("validation", "test")
    for what in (*SCORES, "half_width", "training_seconds")
)
AVERAGED = {
    "test": "test", "early_stopped": "early_stopped", "validation": "best",
    "within_run": "test_half_width", "step_cpu_seconds": "step_cpu_seconds",
    "step_seconds": "step_seconds", "iterations": "iterations",
}  # fmt: skip
"""What is averaged over seeds, and what it is in a `Summary`."""

LARGEST = ("tensor_bytes", "process_bytes")
NOT_CHOSEN = "its grid is not complete"


class Summary:
    """A complete run; scores are accuracies in [0, 1], or mean squared errors; nan: not recorded.

    Its `points` are all validations: ``iteration``, ``seconds`` of training until then, ``score``,
    ``half_width``; `within` are those in the budget, the one at its end included.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.score = next((name for name in SCORES if f"test_{name}" in run.result), SCORES[0])
        self.test = run.number(f"result.test_{self.score}")
        self.test_half_width = run.number("result.test_half_width")
        # of theta at the best validation
        self.early_stopped = run.number(f"result.early_stopped_{self.score}")
        # medians of an outer step, and peaks
        self.step_cpu_seconds = run.number("result.step_cpu_seconds")
        self.step_seconds = run.number("result.step_seconds")
        self.tensor_bytes = run.number("result.step_peak_bytes")
        self.process_bytes = run.number("result.process_peak_bytes")
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
        self.best = float(finite.min() if self.score == "mse" else finite.max())
        fell = [self.score == "accuracy" and _fell(of) for of in (self.within, self.points)]
        self.collapsed, self.collapsed_later = fell[0], fell[1] and not fell[0]
        self.tests = dict(zip(*run.series(f"test/{self.score}"), strict=True))  # by iteration
        # a run with test_at goes on after its budget
        spent_at = zip(*run.series("test/training_seconds"), strict=True)
        known = [run.number("result.iterations"), *map(float, steps[-1:])]
        self.iterations = min(
            (float(step) for step, seconds in spent_at if seconds >= budget),
            default=next((number for number in known if not math.isnan(number)), math.nan),
        )


def mean_record(runs: Sequence[Summary], **more: Mean) -> dict[str, Any]:
    """What is known of runs of equal code and settings together: means over seeds, and counts."""
    largest = {name: [getattr(run, name) for run in runs] for name in LARGEST}
    means = {name: seeds_mean([getattr(run, what) for run in runs])
             for name, what in AVERAGED.items()} | more  # fmt: skip
    return {
        "seeds": len(runs),
        "runs": run_list(run.run.id for run in runs),
        "collapsed": sum(run.collapsed for run in runs),
        "collapsed_after_budget": sum(run.collapsed_later for run in runs),
        "diverged": sum(bool(run.diverged) for run in runs),
        **{name: max(filter(math.isfinite, v), default=math.nan) for name, v in largest.items()},
        **{f"{name}_mean": mean.mean for name, mean in means.items()},
        **{f"{name}_half_width": mean.half_width for name, mean in means.items()},
        **{f"{name}_seeds": mean.number for name, mean in means.items()},
    }


def _fell(points: pd.DataFrame) -> bool:
    """Whether one of the scores is more than `DROP` below the best before it."""
    return bool((points["score"] < points["score"].cummax().ffill().shift() - DROP).any())


Cells = Mapping[str, Sequence[Run]]
"""Every run by the identity of its cell."""


class CellState(NamedTuple):
    """One cell: all of its runs, and the one that counts."""

    name: str  # METHOD/grid/N or METHOD/final/SEED
    identity: str  # empty while the grid that decides its settings is incomplete
    runs: Sequence[Run] = ()  # also killed ones, oldest first
    run: Run | None = None  # the newest complete one
    state: str = definition.PENDING
    why: str = ""  # it is not complete

    @property
    def score(self) -> float:
        """What a grid is decided by; minus infinity without a run, or for a diverged one."""
        return -math.inf if self.run is None else self.run.last_validation


class MethodState:
    """One row of a sweep's table.

    Attributes:
        chosen: the candidate of the final runs, as the sweep decides, or, where it cannot yet, the
            one that has such runs; None: not decided.
        remark: how that was decided, where it was not by a complete grid.
        runs: the complete final runs that count, by seed.
        setting: the chosen candidate's; empty without a grid.
    """

    def __init__(self, group: Group, by_cell: Cells) -> None:
        def states(cells: Mapping[str, Cell]) -> list[CellState]:
            return [_cell(name, cell, by_cell) for name, cell in cells.items()]

        self.name, self.candidates, self.grid = group.name, group.candidates, states(group.grid)
        finals = [states(cells) for cells in group.finals]
        counts = [sum(cell.run is not None for cell in cells) for cells in finals]
        self.chosen: int | None = counts.index(max(counts)) if max(counts) else None
        self.remark = "Final runs are there, but not all of the grid" if max(counts) else ""
        if all(cell.run for cell in self.grid):
            self.chosen = best([cell.score for cell in self.grid]) if self.grid else 0
            self.remark = ""
        unknown = [CellState(name, "", why=NOT_CHOSEN) for name in group.final_names()]
        self.finals = unknown if self.chosen is None else finals[self.chosen]
        self.runs = [cell.run for cell in self.finals if cell.run is not None]
        chosen = self.chosen
        self.setting = NOT_CHOSEN if chosen is None else describe(self.candidates[chosen])


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
        elsewhere = any("tasks.root=DATA" in run.command.split() for run in self.attempts)
        shown = {"benchmark": benchmark} if len(sweep.benchmarks) > 1 else {}
        shown |= {"tasks.root": "DATA"} if elsewhere else {}
        shown |= {key: value for key, value in given.items() if key != "benchmark"}
        self._words = [name, *(f"{key}={format_value(value)}" for key, value in shown.items())]

    def command(self, *only: str) -> str:
        """What runs the sweep, or with ``--cell``, NAME one cell of it."""
        return shlex.join(["python", "-m", "experiments.sweep", *self._words, *only])


def _cell(name: str, cell: Cell, by_cell: Cells) -> CellState:
    runs = by_cell.get(cell.identity, ())
    if (run := newest(runs)) is not None:
        return CellState(name, cell.identity, runs, run, definition.COMPLETED)
    if not runs:
        return CellState(name, cell.identity)
    last = next((run for run in runs if run.status == "RUNNING"), runs[-1])
    if last.status == "RUNNING":
        return CellState(name, cell.identity, runs, None, definition.RUNNING, f"run {last.id}")
    why = f"run {last.id} {last.status}: {last.failure or 'stopped'}"
    return CellState(name, cell.identity, runs, None, last.state, why)


class Request(NamedTuple):
    """What every section gets."""

    archive: Archive
    sweeps: Sequence[SweepState] = ()  # those asked for, on each benchmark
