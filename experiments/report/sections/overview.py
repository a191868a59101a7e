"""How many runs there are, and which sweeps they belong to."""

from __future__ import annotations

from collections import Counter

from experiments.report.content import Section, Source, Table, text_column
from experiments.report.request import Request
from experiments.report.sweep_state import DONE, FAILED, RUNNING, SweepState


def sections(request: Request) -> list[Section]:
    """Always there, also for an empty database."""
    runs = request.archive.runs
    counts = Counter(run.status for run in runs)
    told = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    text = [f"{len(runs)} runs: {told}." if runs else "The database has no runs yet."]
    codes = {name: {run.code.signature for run in runs if run.experiment == name}
             for name in sorted({run.experiment for run in runs})}  # fmt: skip
    several = [f"{name} of {len(found)}" for name, found in codes.items() if len(found) > 1]
    if several:
        text.append(
            f"Versions of the code: runs of {', '.join(several)}. Runs of different code or"
            " settings are in rows of their own, or a line beside the table says what differs."
        )
    return [Section("Overview", tuple(text), (_table(request),) if request.sweeps else ())]


def _table(request: Request) -> Table:
    records = tuple(_record(state) for state in request.sweeps)
    columns = (
        text_column("sweep", "sweep"),
        text_column("benchmark", "benchmark"),
        text_column("complete", "complete"),
        text_column("running", "running"),
        text_column("failed", "failed"),
        text_column("command that fills it", "command"),
    )
    attempts = tuple(run.id for state in request.sweeps for run in state.attempts)
    return Table(
        "sweeps",
        "The sweeps, and how many of their cells the database has.",
        columns,
        records,
        Source("python -m experiments.sweep SWEEP benchmark=NAME", attempts),
    )


def _record(state: SweepState) -> dict[str, object]:
    counts = Counter(cell.state for cell in state.cells)
    return {
        "sweep": state.name,
        "benchmark": state.benchmark,
        "complete": f"{counts[DONE]} of {len(state.cells)}",
        "running": counts[RUNNING] or "",
        "failed": counts[FAILED] or "",
        "command": state.command(),
    }
