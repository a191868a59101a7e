"""What a sweep says: the list of its cells, a line for each that ends, and the summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from types import MappingProxyType
from typing import Any

from experiments.sweeps.board import DONE, FAILED, OPEN, RUNNING, WAITING, Status
from experiments.sweeps.cells import Cell, Settings, describe
from experiments.sweeps.claims import ATTEMPTS
from experiments.sweeps.plan import Plan
from experiments.sweeps.records import CompleteRun

OVERHEAD = 45.0
"""Seconds beyond the budget: start, validation, meta-test; only until a like run is known."""


def expected_seconds(plan: Plan, statuses: Iterable[Status]) -> dict[str, float | None]:
    """How long each cell takes: like its complete neighbours, else its budget; None: unknown."""
    statuses = list(statuses)
    known: dict[str, list[float]] = {}
    for status in statuses:
        if status.run is not None:
            known.setdefault(_kind(status.name), []).append(status.run.seconds)
    cells = {name: cell for g in plan.groups for part in g.finals for name, cell in part.items()}
    answer: dict[str, float | None] = {}
    for status in statuses:
        like, cell = known.get(_kind(status.name)), status.cell or cells.get(status.name)
        answer[status.name] = mean(like) if like else _budget(cell)
    return answer


def remaining(plan: Plan, statuses: Sequence[Status], workers: int) -> str:
    """``about 1 h 20 min with 2 workers`` for what is neither done nor failed."""
    expected = expected_seconds(plan, statuses)
    open_cells = [expected[s.name] for s in statuses if s.state not in (DONE, FAILED)]
    known = [seconds for seconds in open_cells if seconds is not None]
    if open_cells and not known:
        return "of unknown length"
    with_ = f"with {workers} worker{'s' if workers > 1 else ''}"
    unknown = len(open_cells) - len(known)
    extra = f", and {unknown} of unknown length" if unknown else ""
    # the longest cell is a bound too
    return f"about {duration(max([sum(known) / workers, *known, 0]))} {with_}{extra}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(plan: Plan, statuses: Sequence[Status]) -> list[str]:
    """A line a cell: state, expected time, name, and its result or its settings."""
    expected = expected_seconds(plan, statuses)
    width = max(len(status.name) for status in statuses)
    shared = _shared(statuses)
    lines = [f"every run: {describe(shared)}"] if shared else []
    for status in statuses:
        seconds = status.run.seconds if status.run else expected[status.name]
        shown = "?" if seconds is None else duration(seconds)
        told = _detail(status, shared)
        lines.append(f"{status.state:8}{shown:>12}  {status.name:{width}}  {told}")
    return lines


def _shared(statuses: Sequence[Status]) -> Settings:
    """What all cells known so far have in common, if there are several."""
    cells = [status.cell for status in statuses if status.cell is not None]
    if len(cells) < 2:
        return {}
    return {
        key: value
        for key, value in sorted(cells[0].settings.items())
        if all(key in cell.settings and cell.settings[key] == value for cell in cells)
    }


def choices(made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a method: what was chosen, and the accuracies it was chosen by."""
    return [
        f"{method}: {describe(dict(choice['settings']))}, of validation accuracies "
        + " ".join(f"{100 * accuracy:.1f}" for accuracy in choice["accuracies"])
        for method, choice in made.items()
    ]


def summary(plan: Plan, statuses: Sequence[Status], workers: int) -> str:
    """One line: how many cells are done, run, are to do, have failed, and the time left."""
    counts = {state: sum(s.state == state for s in statuses)
              for state in (DONE, RUNNING, OPEN, WAITING, FAILED)}
    changed = sum(s.run is not None and s.run.changed for s in statuses)
    parts = [f"{counts[DONE]} done" + (f" ({changed} by other code)" if changed else "")]
    parts += [f"{counts[RUNNING]} running"] if counts[RUNNING] else []
    parts += [f"{counts[OPEN] + counts[WAITING]} to run"]
    parts += [f"{counts[FAILED]} failed"] if counts[FAILED] else []
    left = counts[RUNNING] + counts[OPEN] + counts[WAITING]
    time = f": {remaining(plan, statuses, workers)}" if left else ""
    return f"{len(statuses)} cells: {', '.join(parts)}{time}"


def finished(status: Status) -> str:
    """The line for a cell that has just ended."""
    return f"{status.name}: {_detail(status)}"


def _detail(status: Status, shared: Settings = MappingProxyType({})) -> str:
    if status.state == FAILED:
        return f"failed: {status.failures[-1] if status.failures else 'no reason is recorded'}"
    if status.run is not None:
        return _result(status.run)
    if status.state == RUNNING:
        return f"on {status.claim.get('host')}, process {status.claim.get('process')}"
    if status.cell is None:
        return "when its grid is complete"
    tried = len(status.failures)
    again = f" (attempt {tried + 1} of {ATTEMPTS}: {status.failures[-1]})" if tried else ""
    own = {k: v for k, v in sorted(status.cell.settings.items()) if k not in shared}
    return f"{' '.join(status.cell.configs)} {describe(own)}{again}".strip()


def _result(run: CompleteRun) -> str:
    accuracy = "done"
    if run.accuracy is not None:
        mean_, half = (100 * value for value in run.accuracy)
        accuracy = f"test accuracy {mean_:.1f} ± {half:.1f} %"
    other = f", other code ({run.commit[:7] or 'no commit'})" if run.changed else ""
    return f"{accuracy}, {duration(run.seconds)}, run {run.run_id}{other}"


def _kind(name: str) -> str:
    """METHOD/grid or METHOD/final."""
    return name.rpartition("/")[0]


def _budget(cell: Cell | None) -> float | None:
    budget = None if cell is None else cell.settings.get("budget")
    return float(budget) + OVERHEAD if isinstance(budget, (int, float)) else None
