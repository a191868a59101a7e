"""Where each cell of a plan stands: what the database has, and what has happened in this call."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pymongo.errors import PyMongoError

from experiments.sweeps.cells import COMPLETED, FAILED, INTERRUPTED, PENDING, RUNNING, Cell
from experiments.sweeps.lock import LEASE, Watch
from experiments.sweeps.plan import Group, Plan, best
from experiments.tracking import UserError
from experiments.tracking.database import Database
from experiments.tracking.ingredient import REPOSITORY

FIELDS = ("config.cell", "status", "start_time", "stop_time", "result", "fail_trace",
          "experiment.sources", "experiment.repositories")  # fmt: skip
Answer = TypeVar("Answer")


def patiently(database: Database, ask: Callable[[], Answer]) -> Answer:
    """The answer, also from a database that is away for less than a lease."""
    deadline = time.monotonic() + LEASE
    while True:
        try:
            return ask()
        except PyMongoError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
            try:
                database.revive()
            except UserError:  # not yet
                continue


def state_of(run: Mapping[str, Any] | None) -> str:
    """The state of a cell whose newest run this is; a death from outside is no failure."""
    if run is None:
        return PENDING
    trace = run.get("fail_trace") or [""]
    killed = run["status"] == "FAILED" and str(trace[0]).startswith("killed:")
    words = {"RUNNING": RUNNING, "COMPLETED": COMPLETED, "FAILED": FAILED}
    return INTERRUPTED if killed else words.get(run["status"], INTERRUPTED)


@dataclass(frozen=True)
class Run:
    """A run of a cell.

    Attributes:
        document: in Sacred's ``runs``.
        changed: whether a source file it recorded differs from the one here.
    """

    document: Mapping[str, Any]
    changed: bool

    @property
    def number(self) -> Any:
        """In Sacred's ``runs``."""
        return self.document["_id"]

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return float((self.document["stop_time"] - self.document["start_time"]).total_seconds())

    @property
    def commit(self) -> str:
        """Of the code; empty outside a repository."""
        repositories = self.document["experiment"].get("repositories") or [{}]
        return str(repositories[0].get("commit", ""))

    def result(self, name: str) -> Any:
        """An entry of its result, None without it."""
        result = self.document.get("result")
        return result.get(name) if isinstance(result, Mapping) else None


class Records:
    """The runs of a database by their cells."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._md5: dict[Any, str] = {}
        self._scores: dict[Any, float] = {}

    def index(self) -> None:
        """Make the look-up by cell independent of the number of runs."""
        self._database.documents["runs"].create_index("config.cell")

    def runs(self, identities: Iterable[str]) -> dict[str, list[Run]]:
        """Every run of each of these cells that has one, oldest first."""
        wanted = {"config.cell": {"$in": list(identities)}}
        found = list(self._database.documents["runs"].find(wanted, dict.fromkeys(FIELDS, 1)))
        self._read_md5(found)
        here: dict[str, str] = {}
        runs: dict[str, list[Run]] = {}
        for run in sorted(found, key=lambda run: (run["start_time"], str(run["_id"]))):
            sources = run["experiment"].get("sources", ())
            changed = any(self._md5.get(file) != _md5_here(name, here) for name, file in sources)
            runs.setdefault(run["config"]["cell"], []).append(Run(run, changed))
        return runs

    def _read_md5(self, runs: Iterable[Mapping[str, Any]]) -> None:
        files = {file for run in runs for _, file in run["experiment"].get("sources", ())}
        unknown = list(files - self._md5.keys())
        for entry in self._database.documents["fs.files"].find({"_id": {"$in": unknown}}):
            self._md5[entry["_id"]] = entry.get("md5", "")

    def score(self, run: Run) -> float:
        """The last ``validation/accuracy``; minus infinity without one, or for a diverged run."""
        if run.number not in self._scores:
            key = {"run_id": run.number, "name": "validation/accuracy"}
            series = self._database.documents["metrics"].find_one(key, {"values": 1})
            value = float(series["values"][-1]) if series and series["values"] else -math.inf
            lost = math.isnan(value) or run.result("diverged")
            self._scores[run.number] = -math.inf if lost else value
        return self._scores[run.number]


def counted(runs: Iterable[Run], redo_changed: bool) -> Run | None:
    """The completed run that counts, the one that ended last."""
    done = [r for r in runs if state_of(r.document) == COMPLETED]
    newest = max(done, key=lambda run: run.document["stop_time"], default=None)
    return None if newest is not None and newest.changed and redo_changed else newest


def _md5_here(name: str, known: dict[str, str]) -> str:
    """The md5 of the source file of this name in this repository, empty if there is none."""
    if name not in known:
        path = REPOSITORY / name
        known[name] = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
    return known[name]


@dataclass(frozen=True)
class Status:
    """One cell's state.

    Attributes:
        name: METHOD/grid/N or METHOD/final/SEED.
        cell: None while the grid that decides its settings is not complete.
        state: PENDING, RUNNING, FAILED, INTERRUPTED or COMPLETED.
        run: the completed run that counts.
        note: where it runs, why it did not complete, what it waits for.
    """

    name: str
    cell: Cell | None
    state: str
    run: Run | None = None
    note: str = ""


class Board:
    """The state of a plan.

    Args:
        plan: its cells.
        database: where the runs are.
        redo_changed: whether a run of other code counts as missing.

    Attributes:
        ended: state and reason of what has ended in this call without completing, by identity.
        choices: index and accuracies of each method's grid that is complete.
    """

    def __init__(self, plan: Plan, database: Database, redo_changed: bool) -> None:
        self.plan = plan
        self.ended: dict[str, tuple[str, str]] = {}
        self.choices: dict[str, tuple[int, list[float]]] = {}
        self._records, self._watch = Records(database), Watch(database)
        self._redo = redo_changed
        self._records.index()

    def look(self) -> list[Status]:
        """The state of every cell now, grids first."""
        found = self._statuses({n: c for g in self.plan.groups for n, c in g.grid.items()})
        finals: dict[str, Cell] = {}
        for group in self.plan.groups:
            missing = [name for name in group.grid if found[name].run is None]
            if not missing or not group.final_names():
                finals |= group.finals[self._choose(group, found)]
            else:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                note = ("nothing is chosen before its whole grid has completed; missing: "
                        f"{', '.join(missing[:3])}{more}")  # fmt: skip
                waits = {n: Status(n, None, PENDING, None, note) for n in group.final_names()}
                found |= waits
        found |= self._statuses(finals)
        return [found[name] for name in self.plan.names()]

    def _choose(self, group: Group, found: Mapping[str, Status]) -> int:
        scores = [self._records.score(run) for n in group.grid if (run := found[n].run)]
        if not scores or not group.final_names():
            return 0
        self.choices[group.name] = best(scores), scores
        return best(scores)

    def _statuses(self, cells: Mapping[str, Cell]) -> dict[str, Status]:
        identities = [cell.identity for cell in cells.values()]
        holders = self._watch.holders(identities)  # before the runs: a run completes while locked
        runs = self._records.runs(identities)
        return {
            name: self._status(name, cell, runs.get(cell.identity, []), holders)
            for name, cell in cells.items()
        }

    def _status(
        self, name: str, cell: Cell, runs: list[Run], holders: Mapping[str, Any]
    ) -> Status:
        if (run := counted(runs, self._redo)) is not None:
            return Status(name, cell, COMPLETED, run)
        if holder := holders.get(cell.identity):
            where = f"on {holder['host']}, process {holder['process']}"
            return Status(name, cell, RUNNING, None, where)
        if cell.identity in self.ended:
            state, reason = self.ended[cell.identity]
            return Status(name, cell, state, None, reason)
        newest = runs[-1].document if runs else None
        state = state_of(newest)
        if newest is None or state == COMPLETED:  # completed by other code
            return Status(name, cell, PENDING)
        trace = newest.get("fail_trace") or ["stopped"]
        note = f"run {newest['_id']}: {str(trace[-1]).strip()}"
        return Status(name, cell, FAILED if state == FAILED else INTERRUPTED, None, note)

    def forget(self) -> None:
        """The database was away: nobody's silence counts."""
        self._watch.forget()
