"""Where each cell of a plan stands, and how a sweep says it.

What counts is what the database has, the locks, and what has ended in this call.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from os.path import isfile  # False also for a name that is too long
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from pymongo.errors import PyMongoError
from sacred.dependencies import get_digest

from experiments.sweeps import definition
from experiments.sweeps.definition import COMPLETED, INTERRUPTED, PENDING, RUNNING, Cell
from experiments.sweeps.lock import LEASE, Document, Watch
from experiments.sweeps.plan import Group, Plan, best
from experiments.sweeps.runs import LONG_AGO, VALIDATION, Run, newest
from experiments.tracking import UserError
from experiments.tracking.database import Database
from experiments.tracking.experiment import REPOSITORY
from experiments.tracking.records import DatabaseRecords, printable

# Seconds beyond the budget: start, validation, meta-test; only until a like run is known.
OVERHEAD = 45.0
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


def runs_of(database: Database, identities: Iterable[str]) -> dict[str, list[Run]]:
    """Every run of each of these cells that has one, oldest first."""
    wanted = {"config.cell": {"$in": list(identities)}}
    runs: dict[str, list[Run]] = {}
    found, here = map(Run, DatabaseRecords(database.documents, wanted).runs), cache(_digest)
    for run in sorted(found, key=lambda run: (run.started or LONG_AGO, str(run.id))):
        run.changed = any(here(name) != md5 for name, md5 in run.code.sources.items())
        runs.setdefault(str(run.settings.get("cell")), []).append(run)
    return runs


def _digest(name: str) -> str:
    """Of a file of the code here; of none elsewhere, whatever a record calls it."""
    path = (REPOSITORY / name).resolve()
    return get_digest(str(path)) if isfile(path) and path.is_relative_to(REPOSITORY) else ""


def counted(runs: Iterable[Run], redo_changed: bool) -> Run | None:
    """The completed run that counts, the one that ended last."""
    run = newest(runs)
    return None if run is not None and redo_changed and run.changed else run


class Status(NamedTuple):
    """One cell's state."""

    name: str  # METHOD/grid/N or METHOD/final/SEED
    cell: Cell | None  # None while the grid that decides its settings is not complete
    state: str  # one of `STATES`
    run: Run | None = None  # the completed run that counts
    note: str = ""  # where it runs, why it did not complete, what it waits for
    scheduler: str = ""  # of the holder of its lock, if running
    runs: Sequence[Run] = ()  # all of it, oldest first

    @property
    def kind(self) -> str:
        """METHOD/grid or METHOD/final, whose cells take as long as one another."""
        return self.name.rpartition("/")[0]

    @property
    def seconds(self) -> float:
        """From the start to the end of the run that counts; NaN without one."""
        return math.nan if self.run is None else self.run.seconds


def recorded(name: str, cell: Cell, runs: Sequence[Run], redo_changed: bool = False) -> Status:
    """What a cell's runs alone say of it, oldest first."""
    if (run := counted(runs, redo_changed)) is not None:
        return Status(name, cell, COMPLETED, run, runs=runs)
    if not runs or runs[-1].complete:  # by other code
        return Status(name, cell, PENDING, runs=runs)
    last = runs[-1]
    note = f"run {last.id}" + (f": {last.failure}" if last.failure else "")
    return Status(name, cell, last.state, None, note, runs=runs)


class Board:
    """The state of a plan; with `redo_changed`, a run of other code counts as missing."""

    def __init__(self, plan: Plan, database: Database, redo_changed: bool) -> None:
        self.plan, self.redo_changed = plan, redo_changed
        # State and reason of what has ended in this call without completing, by identity.
        self.ended: dict[str, tuple[str, str]] = {}
        # A line a method whose grid is complete: what was chosen, of which accuracies.
        self.choices: dict[str, str] = {}
        self._scores: dict[Any, float] = {}  # of completed runs
        self.database, self._watch = database, Watch(database)
        database.documents["runs"].create_index("config.cell")

    def look(self) -> list[Status]:
        """The state of every cell now, grids first; a database that is away is waited for."""
        return patiently(self.database, self.look_once)

    def look_once(self) -> list[Status]:
        """The same; PyMongoError if it is away."""
        found = self._statuses({n: c for g in self.plan.groups for n, c in g.grid.items()})
        finals: dict[str, Cell] = {}
        for group in self.plan.groups:
            missing = [name for name in group.grid if found[name].run is None]
            if not missing or not group.final_names():
                finals |= group.finals[self._choose(group, found)]
                continue
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            note = ("nothing is chosen before its whole grid has completed; missing: "
                    f"{', '.join(missing[:3])}{more}")
            found |= {n: Status(n, None, PENDING, None, note) for n in group.final_names()}
        found |= self._statuses(finals)
        return [found[name] for name in self.plan.names()]

    def _choose(self, group: Group, found: Mapping[str, Status]) -> int:
        if not group.grid or not group.final_names():
            return 0
        scores = [self._score(run) for name in group.grid if (run := found[name].run)]
        chosen, shown = best(scores), " ".join(f"{100 * score:.1f}" for score in scores)
        setting = definition.describe(group.candidates[chosen])
        self.choices[group.name] = f"{group.name}: {setting}, of validation accuracies {shown}"
        return chosen

    def _score(self, run: Run) -> float:
        """The last ``validation/accuracy``; minus infinity without one, or for a diverged run."""
        if run.id not in self._scores:
            of_cell = {"config.cell": run.settings["cell"]}
            found = DatabaseRecords(self.database.documents, of_cell)
            for metric in found.metrics([run.id], [VALIDATION]):
                run.metrics[metric.name] = metric.series
            self._scores[run.id] = run.last_validation
        return self._scores[run.id]

    def _statuses(self, cells: Mapping[str, Cell]) -> dict[str, Status]:
        identities = [cell.identity for cell in cells.values()]
        holders = self._watch.holders(identities)  # before the runs: a run completes while locked
        runs = runs_of(self.database, identities)
        return {name: self._status(name, cell, runs.get(own, []), holders.get(own))
                for (name, cell), own in zip(cells.items(), identities, strict=True)}  # fmt: skip

    def _status(self, name: str, cell: Cell, runs: list[Run], holder: Document | None) -> Status:
        status = recorded(name, cell, runs, self.redo_changed)
        if status.run is not None:
            return status
        if holder is not None:
            where = printable(f"on {holder.get('host')}, process {holder.get('process')}")
            return Status(name, cell, RUNNING, None, where, str(holder.get("scheduler")))
        if cell.identity in self.ended:
            state, reason = self.ended[cell.identity]
            return Status(name, cell, state, None, reason)
        return status._replace(state=INTERRUPTED) if status.state == RUNNING else status


def expected_seconds(statuses: Sequence[Status]) -> dict[str, float]:
    """How long each cell takes: like its complete neighbours, else its budget; NaN: unknown."""

    def seconds(status: Status) -> float:
        budget = status.cell.settings.get("budget") if status.cell else None
        own = budget + OVERHEAD if isinstance(budget, (int, float)) else math.nan
        return mean([s.seconds for s in statuses if s.run and s.kind == status.kind] or [own])

    return {status.name: seconds(status) for status in statuses}


def remaining(statuses: Sequence[Status], workers: int) -> str:
    """``about 1 h 20 min with 2 workers`` for what runs or is to run, also once more."""
    expected = expected_seconds(statuses)
    left = [expected[s.name] for s in statuses if s.state != COMPLETED]
    known = [seconds for seconds in left if not math.isnan(seconds)]
    if left and not known:
        return "of unknown length"
    # the longest cell is a bound too
    least = duration(max([sum(known) / max(workers, 1), *known, 0]))
    about = "about" if len(known) == len(left) else "at least"
    return f"{about} {least} with {workers} worker{'s' * (workers != 1)}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``, ``?``."""
    if math.isnan(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(statuses: Sequence[Status]) -> list[str]:
    """A line a cell: state, expected time, name, and its result or its settings."""
    expected = expected_seconds(statuses)
    width = max(len(status.name) for status in statuses)
    known = [status.cell.settings for status in statuses if status.cell is not None]
    first = sorted(known[0].items()) if len(known) > 1 else []
    shared = {k: v for k, v in first if all(k in other and other[k] == v for other in known)}
    lines = [f"every run: {definition.describe(shared)}"] if shared else []
    for status in statuses:
        shown = duration(status.seconds if status.run else expected[status.name])
        own = ""
        if status.cell is not None and status.run is None:
            other = {k: v for k, v in sorted(status.cell.settings.items()) if k not in shared}
            own = f"{' '.join(status.cell.configs)} {definition.describe(other)}".strip()
        told = "; ".join(filter(None, (own, _detail(status))))
        lines.append(f"{status.state:11}{shown:>12}  {status.name:{width}}  {told}".rstrip())
    return lines


def summary(statuses: Sequence[Status], workers: int) -> str:
    """One line: how many cells are in which state, and the time left."""
    counts = Counter(status.state for status in statuses)
    parts = [f"{counts[state]} {state}" for state in definition.STATES
             if counts[state] or state == COMPLETED]
    if changed := sum(s.run is not None and s.run.changed for s in statuses):
        parts[0] += f" ({changed} by other code)"
    time = f": {remaining(statuses, workers)}" if counts[PENDING] + counts[RUNNING] else ""
    return f"{len(statuses)} cells: {', '.join(parts)}{time}"


def ended(status: Status) -> str:
    """The line for a cell that has just ended, or does not go on."""
    state = "" if status.state == COMPLETED else f"{status.state}: "
    return f"{status.name}: {state}{_detail(status)}"


def _detail(status: Status) -> str:
    if (run := status.run) is None:
        return status.note
    accuracy, half = (run.number(f"result.test_{name}") for name in ("accuracy", "half_width"))
    told = "completed" if math.isnan(accuracy) else f"test accuracy {100 * accuracy:.1f}"
    told += "" if math.isnan(accuracy) else " %" if math.isnan(half) else f" ± {100 * half:.1f} %"
    other = f", other code ({run.code.commit[:7] or 'no commit'})" if run.changed else ""
    return f"{told}, {duration(status.seconds)}, run {run.id}{other}"
