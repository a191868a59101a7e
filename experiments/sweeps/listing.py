"""What a sweep says: the list of its cells, a line for each that ends, and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from experiments.sweeps.definition import COMPLETED, PENDING, RUNNING, STATES, Settings, describe
from experiments.sweeps.records import Board, Status

OVERHEAD = 45.0
"""Seconds beyond the budget: start, validation, meta-test; only until a like run is known."""


def expected_seconds(statuses: Sequence[Status]) -> dict[str, float | None]:
    """How long each cell takes: like its complete neighbours, else its budget; None: unknown."""
    known: dict[str, list[float]] = {}
    for status in statuses:
        if status.run is not None:
            known.setdefault(_kind(status.name), []).append(status.run.seconds)
    answer: dict[str, float | None] = {}
    for status in statuses:
        budget = status.cell.settings.get("budget") if status.cell is not None else None
        like = known.get(_kind(status.name), [])
        like = like or ([budget + OVERHEAD] if isinstance(budget, (int, float)) else [])
        answer[status.name] = mean(like) if like else None
    return answer


def remaining(statuses: Sequence[Status], workers: int) -> str:
    """``about 1 h 20 min with 2 workers`` for what is pending or runs."""
    expected = expected_seconds(statuses)
    left = [expected[s.name] for s in statuses if s.state in (PENDING, RUNNING)]
    known = [seconds for seconds in left if seconds is not None]
    if left and not known:
        return "of unknown length"
    unknown = f", and {len(left) - len(known)} of unknown length" if len(known) < len(left) else ""
    # the longest cell is a bound too
    about = duration(max([sum(known) / max(workers, 1), *known, 0]))
    return f"about {about} with {workers} worker{'s' * (workers != 1)}{unknown}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(statuses: Sequence[Status]) -> list[str]:
    """A line a cell: state, expected time, name, and its result or its settings."""
    expected = expected_seconds(statuses)
    width = max(len(status.name) for status in statuses)
    shared = _shared(statuses)
    lines = [f"every run: {describe(shared)}"] if shared else []
    for status in statuses:
        seconds = status.run.seconds if status.run else expected[status.name]
        shown = "?" if seconds is None else duration(seconds)
        own = ""
        if status.cell is not None and status.run is None:
            other = {k: v for k, v in sorted(status.cell.settings.items()) if k not in shared}
            own = f"{' '.join(status.cell.configs)} {describe(other)}".strip()
        told = "; ".join(filter(None, (own, _detail(status))))
        lines.append(f"{status.state:11}{shown:>12}  {status.name:{width}}  {told}".rstrip())
    return lines


def _shared(statuses: Sequence[Status]) -> Settings:
    """What all cells known so far have in common, if there are several."""
    cells = [status.cell.settings for status in statuses if status.cell is not None]
    first = sorted(cells[0].items()) if len(cells) > 1 else []
    return {k: v for k, v in first if all(k in other and other[k] == v for other in cells)}


def choices(board: Board) -> list[str]:
    """A line a method: what was chosen, and the accuracies it was chosen by."""
    candidates = {group.name: group.candidates for group in board.plan.groups}
    return [
        f"{method}: {describe(candidates[method][index])}, of validation accuracies "
        + " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        for method, (index, accuracies) in board.choices.items()
    ]


def summary(statuses: Sequence[Status], workers: int) -> str:
    """One line: how many cells are in which state, and the time left."""
    changed = sum(s.run is not None and s.run.changed for s in statuses)
    parts = []
    for state in STATES:
        count = sum(s.state == state for s in statuses)
        other = f" ({changed} by other code)" if changed and state == COMPLETED else ""
        parts += [f"{count} {state}{other}"] if count or state == COMPLETED else []
    left = any(s.state in (PENDING, RUNNING) for s in statuses)
    time = f": {remaining(statuses, workers)}" if left else ""
    return f"{len(statuses)} cells: {', '.join(parts)}{time}"


def ended(status: Status) -> str:
    """The line for a cell that has just ended, or does not go on."""
    state = "" if status.state == COMPLETED else f"{status.state}: "
    return f"{status.name}: {state}{_detail(status)}"


def _detail(status: Status) -> str:
    if (run := status.run) is None:
        return status.note
    accuracy, half = run.result("test_accuracy"), run.result("test_half_width")
    told = "completed" if accuracy is None else f"test accuracy {100 * accuracy:.1f}"
    told += "" if accuracy is None else " %" if half is None else f" ± {100 * half:.1f} %"
    repositories = run.document["experiment"].get("repositories") or [{}]
    commit = repositories[0].get("commit", "")[:7] or "no commit"
    other = f", other code ({commit})" if run.changed else ""
    return f"{told}, {duration(run.seconds)}, run {run.document['_id']}{other}"


def _kind(name: str) -> str:
    """METHOD/grid or METHOD/final."""
    return name.rpartition("/")[0]
