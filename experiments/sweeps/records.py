"""Where each cell of a plan stands: what the database has, and what has happened in this call."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pymongo.errors import PyMongoError

from experiments.sweeps.cells import COMPLETED, FAILED, INTERRUPTED, PENDING, RUNNING, Cell
from experiments.sweeps.lock import LEASE, Watch
from experiments.sweeps.plan import Group, Plan, best
from experiments.tracking import UserError
from experiments.tracking.database import Database
from experiments.tracking.experiment import REPOSITORY

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
            with suppress(UserError):  # not yet
                database.revive()


def state_of(run: Mapping[str, Any] | None) -> str:
    """The state of a cell whose newest run this is; a death from outside is no failure."""
    if run is None:
        return PENDING
    trace = run.get("fail_trace") or [""]
    if run["status"] == "FAILED" and not str(trace[0]).startswith("killed:"):
        return FAILED
    return {"RUNNING": RUNNING, "COMPLETED": COMPLETED}.get(run["status"], INTERRUPTED)


@dataclass(frozen=True)
class Run:
    """A run of a cell: its document in Sacred's ``runs``, and whether its code is not that here."""

    document: Mapping[str, Any]
    changed: bool

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return float((self.document["stop_time"] - self.document["start_time"]).total_seconds())

    def result(self, name: str) -> Any:
        """An entry of its result, None without it."""
        result = self.document.get("result")
        return result.get(name) if isinstance(result, Mapping) else None


def runs_of(database: Database, identities: Iterable[str]) -> dict[str, list[Run]]:
    """Every run of each of these cells that has one, oldest first."""
    wanted = {"config.cell": {"$in": list(identities)}}
    found = list(database.documents["runs"].find(wanted, dict.fromkeys(FIELDS, 1)))
    sources = {run["_id"]: run["experiment"].get("sources", ()) for run in found}
    files = {"_id": {"$in": list({file for pairs in sources.values() for _, file in pairs})}}
    md5 = {f["_id"]: f.get("md5", "") for f in database.documents["fs.files"].find(files)}

    @cache
    def md5_here(name: str) -> str:
        path = REPOSITORY / name
        return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""

    runs: dict[str, list[Run]] = {}
    for run in sorted(found, key=lambda run: (run["start_time"], str(run["_id"]))):
        changed = any(md5.get(file) != md5_here(name) for name, file in sources[run["_id"]])
        runs.setdefault(run["config"]["cell"], []).append(Run(run, changed))
    return runs


def counted(runs: Iterable[Run], redo_changed: bool) -> Run | None:
    """The completed run that counts, the one that ended last."""
    done = [run for run in runs if state_of(run.document) == COMPLETED]
    newest = max(done, key=lambda run: run.document["stop_time"], default=None)
    return None if newest is not None and newest.changed and redo_changed else newest


@dataclass(frozen=True)
class Status:
    """One cell's state.

    Attributes:
        name: METHOD/grid/N or METHOD/final/SEED.
        cell: None while the grid that decides its settings is not complete.
        state: PENDING, RUNNING, FAILED, INTERRUPTED or COMPLETED.
        run: the completed run that counts.
        note: where it runs, why it did not complete, what it waits for.
        scheduler: of the holder of its lock, if RUNNING.
    """

    name: str
    cell: Cell | None
    state: str
    run: Run | None = None
    note: str = ""
    scheduler: str = ""


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
        self.plan, self.redo_changed = plan, redo_changed
        self.ended: dict[str, tuple[str, str]] = {}
        self.choices: dict[str, tuple[int, list[float]]] = {}
        self._database, self._watch = database, Watch(database)
        database.documents["runs"].create_index("config.cell")

    def look(self) -> list[Status]:
        """The state of every cell now, grids first."""
        found = self._statuses({n: c for g in self.plan.groups for n, c in g.grid.items()})
        finals: dict[str, Cell] = {}
        for group in self.plan.groups:
            missing = [name for name in group.grid if found[name].run is None]
            if not missing or not group.final_names():
                finals |= group.finals[self._choose(group, found)]
                continue
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            note = ("nothing is chosen before its whole grid has completed; missing: "
                    f"{', '.join(missing[:3])}{more}")  # fmt: skip
            found |= {n: Status(n, None, PENDING, None, note) for n in group.final_names()}
        found |= self._statuses(finals)
        return [found[name] for name in self.plan.names()]

    def _choose(self, group: Group, found: Mapping[str, Status]) -> int:
        runs = [run for name in group.grid if (run := found[name].run)]
        if not runs or not group.final_names():
            return 0
        scores = [self._score(run) for run in runs]
        self.choices[group.name] = best(scores), scores
        return best(scores)

    def _score(self, run: Run) -> float:
        """The last ``validation/accuracy``; minus infinity without one, or for a diverged run."""
        key = {"run_id": run.document["_id"], "name": "validation/accuracy"}
        series = self._database.documents["metrics"].find_one(key, {"values": {"$slice": -1}})
        value = float(series["values"][-1]) if series and series["values"] else -math.inf
        return -math.inf if math.isnan(value) or run.result("diverged") else value

    def _statuses(self, cells: Mapping[str, Cell]) -> dict[str, Status]:
        identities = [cell.identity for cell in cells.values()]
        holders = self._watch.holders(identities)  # before the runs: a run completes while locked
        runs = runs_of(self._database, identities)
        return {
            name: self._status(name, cell, runs.get(cell.identity, []), holders.get(cell.identity))
            for name, cell in cells.items()
        }

    def _status(
        self, name: str, cell: Cell, runs: list[Run], holder: Mapping[str, Any] | None
    ) -> Status:
        if (run := counted(runs, self.redo_changed)) is not None:
            return Status(name, cell, COMPLETED, run)
        if holder is not None:
            where = f"on {holder['host']}, process {holder['process']}"
            return Status(name, cell, RUNNING, None, where, holder["scheduler"])
        if cell.identity in self.ended:
            state, reason = self.ended[cell.identity]
            return Status(name, cell, state, None, reason)
        newest = runs[-1].document if runs else None
        if newest is None or newest["status"] == "COMPLETED":  # by other code
            return Status(name, cell, PENDING)
        state = FAILED if state_of(newest) == FAILED else INTERRUPTED
        trace = newest.get("fail_trace") or ["stopped"]
        return Status(name, cell, state, None, f"run {newest['_id']}: {str(trace[-1]).strip()}")
