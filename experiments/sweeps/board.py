"""Where each cell of a plan stands, read from the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.sweeps.cells import Cell
from experiments.sweeps.claims import Claims, Document
from experiments.sweeps.plan import Group, Plan
from experiments.sweeps.records import CompleteRun, Records

DONE, RUNNING, OPEN, WAITING, FAILED = "done", "running", "to do", "waits", "failed"
NO_CANDIDATE = "no setting of its grid completed"


@dataclass(frozen=True)
class Status:
    """One cell's state.

    Attributes:
        name: METHOD/grid/N or METHOD/final/SEED.
        cell: None while the grid that decides its settings is not complete.
        state: DONE, RUNNING (claimed by a worker), OPEN, WAITING (for its grid) or FAILED.
        run: the complete run, if DONE.
        claim: the document of its claim, if it has one.
    """

    name: str
    cell: Cell | None
    state: str
    run: CompleteRun | None = None
    claim: Document = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Why it failed, once an attempt."""
        return self.claim.get("failures", [])


class Board:
    """The state of a plan.

    Args:
        plan: its cells.
        records: the runs.
        claims: who runs what.
        redo_changed: whether a run of other code counts as missing.

    Attributes:
        choices: what was chosen, by method, as of the last `look`.
    """

    def __init__(self, plan: Plan, records: Records, claims: Claims, redo_changed: bool) -> None:
        self.plan = plan
        self._records, self._claims, self._redo = records, claims, redo_changed
        self.choices: dict[str, dict[str, Any]] = {}

    def look(self) -> list[Status]:
        """The state of every cell now, grids first."""
        grids = self._statuses({n: c for g in self.plan.groups for n, c in g.grid.items()})
        finals: dict[str, Cell] = {}
        rest: dict[str, Status] = {}
        for group in self.plan.groups:
            candidate, state = self._decide(group, grids)
            if candidate is not None:
                finals.update(group.finals[candidate])
            else:
                rest.update({name: _undecided(name, state) for name in group.final_names()})
        found = {**grids, **self._statuses(finals), **rest}
        return [found[name] for name in self.plan.names()]

    def look_at(self, name: str, cell: Cell) -> Status:
        """The state of one cell now."""
        return self._statuses({name: cell})[name]

    def _statuses(self, cells: dict[str, Cell]) -> dict[str, Status]:
        identities = [cell.identity for cell in cells.values()]
        claims = self._claims.find(identities)  # before the runs: a run completes while claimed
        runs = self._records.complete(identities)
        return {
            name: self._status(name, cell, runs.get(cell.identity), claims.get(cell.identity, {}))
            for name, cell in cells.items()
        }

    def _status(self, name: str, cell: Cell, run: CompleteRun | None, claim: Document) -> Status:
        if run is not None and not (run.changed and self._redo):
            return Status(name, cell, DONE, run, claim)
        state = {"claimed": RUNNING, "failed": FAILED}.get(claim.get("state", ""), OPEN)
        return Status(name, cell, state, None, claim)

    def _decide(self, group: Group, grids: dict[str, Status]) -> tuple[int | None, str]:
        """The chosen candidate's index, or None and the state of the final cells."""
        if not group.grid or not group.final_names():
            return 0, OPEN
        found = [grids[name] for name in group.grid]
        if any(status.state not in (DONE, FAILED) for status in found):
            return None, WAITING
        runs = {s.cell.identity: s.run for s in found if s.cell is not None and s.run is not None}
        if not runs:
            return None, FAILED
        cells = [(c, s.cell) for c, s in zip(group.candidates, found, strict=True) if s.cell]
        choice = self.choices[group.name] = self._records.choose(group.name, cells, runs)
        return int(choice["index"]), OPEN


def _undecided(name: str, state: str) -> Status:
    return Status(name, None, state, None, {"failures": [NO_CANDIDATE]} if state == FAILED else {})
