"""The cells that are not there, and what would fill them."""

from __future__ import annotations

from experiments.report.content import Source, Table, file_name, text_column
from experiments.report.differences import run_list
from experiments.report.sweep_state import DONE, SweepState

FOLDED_FROM = 13
COLUMNS = (
    text_column("cell", "cell"),
    text_column("state", "state"),
    text_column("why", "why"),
    text_column("runs", "attempts"),
    text_column("command", "command"),
)


def missing_table(state: SweepState) -> Table | None:
    """Every incomplete cell with its command; None where all are done."""
    cells = [cell for cell in state.cells if cell.state != DONE]
    if not cells:
        return None
    records = tuple(
        {
            "cell": cell.name,
            "state": cell.state,
            "why": cell.why,
            "attempts": run_list(run.id for run in cell.runs),
            "command": state.command(cell.name),
        }
        for cell in cells
    )
    attempts = tuple(run.id for cell in cells for run in cell.runs)
    return Table(
        file_name("missing", state.name, state.benchmark),
        f"Missing: {len(cells)} of {len(state.cells)} cells. One command fills all of them:"
        f" {state.command()}",
        COLUMNS,
        records,
        Source(state.command(), attempts),
        folded=len(cells) >= FOLDED_FROM,
    )
