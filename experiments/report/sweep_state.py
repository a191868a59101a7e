"""Where each cell of a sweep stands, from the runs alone: nothing is chosen or written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from experiments.report.runs import Archive, Run
from experiments.sweeps.definition import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    PENDING,
    RUNNING,
    Cell,
    Settings,
    Sweep,
    describe,
    format_value,
)
from experiments.sweeps.plan import Group, best, make_plan

VALIDATION = "validation/accuracy"
LONG_AGO = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class CellState:
    """One cell: all of its runs, and the one that counts.

    Attributes:
        name: METHOD/grid/N or METHOD/final/SEED.
        cell: None while the grid that decides its settings is incomplete.
        runs: every run of it, also killed ones, oldest first.
        run: the newest complete one.
        state: PENDING, RUNNING, FAILED, INTERRUPTED or COMPLETED.
        why: of a cell that is not complete.
    """

    name: str
    cell: Cell | None
    runs: tuple[Run, ...]
    run: Run | None
    state: str
    why: str


@dataclass(frozen=True)
class MethodState:
    """One row of a sweep's table.

    Attributes:
        candidates: the settings of its grid.
        chosen: the index of the candidate of the final runs; None: not decided.
        remark: how that was decided, where it was not by a complete grid.
    """

    name: str
    candidates: Sequence[Settings]
    grid: tuple[CellState, ...]
    finals: tuple[CellState, ...]
    chosen: int | None
    remark: str

    @property
    def setting(self) -> str:
        """The chosen candidate's settings; empty while none is chosen or without a grid."""
        return "" if self.chosen is None else describe(self.candidates[self.chosen])

    @property
    def runs(self) -> list[Run]:
        """The complete final runs that count, by seed."""
        return [cell.run for cell in self.finals if cell.run is not None]


@dataclass(frozen=True)
class SweepState:
    """A sweep on one benchmark.

    Attributes:
        words: the sweep's arguments, such as ("accuracy", "benchmark=caltech101").
    """

    name: str
    benchmark: str
    words: tuple[str, ...]
    methods: tuple[MethodState, ...]

    @property
    def cells(self) -> list[CellState]:
        """All, grids first."""
        grids = [cell for method in self.methods for cell in method.grid]
        return grids + [cell for method in self.methods for cell in method.finals]

    @property
    def runs(self) -> list[Run]:
        """The complete final runs that count."""
        return [run for method in self.methods for run in method.runs]

    @property
    def attempts(self) -> list[Run]:
        """Every run of any of its cells."""
        return [run for cell in self.cells for run in cell.runs]

    def command(self, cell: str | None = None) -> str:
        """What runs the sweep, or one cell of it."""
        only = ["--cell", cell] if cell else []
        return shlex.join(["python", "-m", "experiments.sweep", *self.words, *only])


def read_sweep(
    name: str, sweep: Sweep, benchmark: str, given: Settings, archive: Archive
) -> SweepState:
    """The state of a sweep.

    Args:
        name: of the sweep.
        sweep: its definition.
        benchmark: one of its own.
        given: further KEY=VALUE of the sweep's command line.
        archive: where its runs are looked for.

    Raises:
        UserError: KEY=VALUE that the sweep does not take.
    """
    plan = make_plan(sweep, {**given, "benchmark": benchmark})
    by_cell: dict[str, list[Run]] = {}
    for run in archive.runs:
        by_cell.setdefault(str(run.settings.get("cell")), []).append(run)
    methods = tuple(_method(group, by_cell, archive) for group in plan.groups)
    state = SweepState(name, benchmark, (), methods)
    elsewhere = any("tasks.root=DATA" in run.command.split() for run in state.attempts)
    shown: dict[str, object] = {"tasks.root": "DATA"} if elsewhere else {}
    shown |= {key: value for key, value in given.items() if key != "benchmark"}
    settings = [f"{key}={format_value(value)}" for key, value in shown.items()]
    benchmarks = [f"benchmark={benchmark}"] if len(sweep.benchmarks) > 1 else []
    return SweepState(name, benchmark, (name, *benchmarks, *settings), methods)


Cells = Mapping[str, Sequence[Run]]
"""Every run by the identity of its cell."""


def _method(group: Group, by_cell: Cells, archive: Archive) -> MethodState:
    grid = tuple(_cell(name, cell, by_cell) for name, cell in group.grid.items())
    chosen, remark = _chosen(group, grid, by_cell, archive)
    if chosen is None:
        why = "its grid is not complete"
        finals = [CellState(name, None, (), None, PENDING, why) for name in group.final_names()]
    else:
        finals = [_cell(name, cell, by_cell) for name, cell in group.finals[chosen].items()]
    return MethodState(group.name, group.candidates, grid, tuple(finals), chosen, remark)


def _cell(name: str, cell: Cell, by_cell: Cells) -> CellState:
    runs = tuple(by_cell.get(cell.identity, ()))
    complete = [run for run in runs if run.complete]
    if complete:
        newest = max(complete, key=lambda run: run.last_sign or LONG_AGO)
        return CellState(name, cell, runs, newest, COMPLETED, "")
    if not runs:
        return CellState(name, cell, runs, None, PENDING, "")
    last = next((run for run in runs if run.status == "RUNNING"), runs[-1])
    if last.status == "RUNNING":
        return CellState(name, cell, runs, None, RUNNING, f"run {last.id}")
    killed = last.status == "INTERRUPTED" or last.failure.startswith("killed:")
    why = f"run {last.id} {last.status}: {last.failure or 'stopped'}"
    return CellState(name, cell, runs, None, INTERRUPTED if killed else FAILED, why)


def _chosen(
    group: Group, grid: Sequence[CellState], by_cell: Cells, archive: Archive
) -> tuple[int | None, str]:
    """As the sweep decides; where it cannot yet, the candidate that has final runs."""
    if not grid:
        return 0, ""
    if all(cell.state == COMPLETED for cell in grid):
        archive.load([cell.run for cell in grid if cell.run is not None], [VALIDATION])
        scores = [last_validation(cell, archive) for cell in grid]
        return best(scores), ""
    counts = [sum(any(run.complete for run in by_cell.get(cell.identity, ()))
                  for cell in finals.values()) for finals in group.finals]  # fmt: skip
    if max(counts) == 0:
        return None, ""
    return counts.index(max(counts)), "Final runs are there, but not all of the grid"


def last_validation(cell: CellState, archive: Archive) -> float:
    """What a grid is decided by; minus infinity for a cell without a run, or a diverged one."""
    if cell.run is None or cell.run.result.get("diverged"):
        return -math.inf
    values = archive.series(cell.run, VALIDATION).values
    return values[-1] if values and math.isfinite(values[-1]) else -math.inf
