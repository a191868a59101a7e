"""Where each cell of a sweep stands, from the runs alone: nothing is claimed, chosen or written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.report.archive import Archive, Run
from experiments.sweeps.cells import Cell, Settings, describe, format_value
from experiments.sweeps.definition import Sweep
from experiments.sweeps.plan import Group, make_plan

CHOICES = "sweep_choices"
DONE, RUNNING, FAILED, MISSING, WAITING = "done", "running", "failed", "not run", "waits"
VALIDATION = "validation/accuracy"


@dataclass(frozen=True)
class CellState:
    """One cell: all of its runs, and the one that counts.

    Attributes:
        name: METHOD/grid/N or METHOD/final/SEED.
        cell: None while the grid that decides its settings is incomplete.
        runs: every run of it, also killed ones, oldest first.
        run: the newest complete one.
        state: DONE, RUNNING, FAILED, MISSING or WAITING.
        why: of a cell that is not done.
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
        """All complete runs that count."""
        return [cell.run for cell in self.cells if cell.run is not None]

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
        given: further KEY=VALUE of the sweep's command line.

    Raises:
        UserError: KEY=VALUE that the sweep does not take.
    """
    plan = make_plan(sweep, {**given, "benchmark": benchmark})
    reader = _Reader(archive)
    methods = tuple(reader.method(group) for group in plan.groups)
    state = SweepState(name, benchmark, (), methods)
    elsewhere = any("tasks.root=DATA" in run.command.split() for run in state.attempts)
    shown: dict[str, object] = {"tasks.root": "DATA"} if elsewhere else {}
    shown |= {key: value for key, value in given.items() if key != "benchmark"}
    settings = [f"{key}={format_value(value)}" for key, value in shown.items()]
    benchmarks = [f"benchmark={benchmark}"] if len(sweep.benchmarks) > 1 else []
    return SweepState(name, benchmark, (name, *benchmarks, *settings), methods)


class _Reader:
    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._by_cell: dict[str, list[Run]] = {}
        for run in archive.runs:
            self._by_cell.setdefault(str(run.settings.get("cell")), []).append(run)

    def method(self, group: Group) -> MethodState:
        grid = tuple(self._cell(name, cell) for name, cell in group.grid.items())
        chosen, remark = self._chosen(group, grid)
        if chosen is None:
            why = "its grid is not complete"
            names = group.final_names()
            finals = tuple(CellState(name, None, (), None, WAITING, why) for name in names)
        else:
            cells = group.finals[chosen].items()
            finals = tuple(self._cell(name, cell) for name, cell in cells)
        return MethodState(group.name, group.candidates, grid, finals, chosen, remark)

    def _cell(self, name: str, cell: Cell) -> CellState:
        runs = tuple(self._by_cell.get(cell.identity, ()))
        complete = [run for run in runs if run.complete]
        if complete:
            newest = max(complete, key=lambda run: (run.last_sign is not None, run.last_sign))
            return CellState(name, cell, runs, newest, DONE, "")
        state, why = self._open(runs)
        return CellState(name, cell, runs, None, state, why)

    def _open(self, runs: Sequence[Run]) -> tuple[str, str]:
        if any(run.status == "RUNNING" for run in runs):
            return RUNNING, f"run {next(r.id for r in runs if r.status == 'RUNNING')}"
        if runs:
            last = runs[-1]
            return FAILED, f"run {last.id} {last.status}: {last.failure or 'stopped'}"
        return MISSING, ""

    def _chosen(self, group: Group, grid: Sequence[CellState]) -> tuple[int | None, str]:
        """As the sweep decides; where it could not yet, the candidate that has final runs."""
        if not group.grid:
            return 0, ""
        recorded = self._recorded_choice(group)
        if recorded is not None:
            return recorded, ""
        if all(cell.state == DONE for cell in grid):
            return self._best(grid), ""
        counts = [self._number_of_runs(finals) for finals in group.finals]
        if max(counts) == 0:
            return None, ""
        return counts.index(max(counts)), "Final runs are there, but not all of the grid"

    def _recorded_choice(self, group: Group) -> int | None:
        cells = [cell.identity for cell in group.grid.values()]
        choices = [c for c in self._archive.collection(CHOICES) if c.get("cells") == cells]
        if not choices:
            return None
        return int(max(choices, key=lambda choice: choice["time"])["index"])

    def _best(self, grid: Sequence[CellState]) -> int:
        """The highest last validation accuracy; the first of equals; a diverged run last."""
        scores = [last_validation(cell, self._archive) for cell in grid]
        return scores.index(max(scores))

    def _number_of_runs(self, finals: Mapping[str, Cell]) -> int:
        runs = [self._by_cell.get(cell.identity, []) for cell in finals.values()]
        return sum(any(run.complete for run in tries) for tries in runs)


def last_validation(cell: CellState, archive: Archive) -> float:
    """What a grid is decided by; minus infinity for a cell without a run, or a diverged one."""
    if cell.run is None or cell.run.result.get("diverged"):
        return -math.inf
    values = archive.series(cell.run, VALIDATION).values
    return values[-1] if values and math.isfinite(values[-1]) else -math.inf
