"""How each method's setting was chosen: the runs of its grid."""

from __future__ import annotations

import math

from experiments.report.archive import Archive
from experiments.report.content import Column, Source, Table, file_name, number, text_column
from experiments.report.sweep_state import SweepState, last_validation
from experiments.sweeps.cells import describe

COLUMNS = (
    text_column("method", "method"),
    text_column("setting", "setting"),
    Column("last validation, %", lambda r: _shown(r["validation_accuracy"], r["state"])),
    text_column("chosen", "chosen"),
    text_column("run", "run"),
)


def grid_table(state: SweepState, archive: Archive) -> Table | None:
    """The last validation accuracy of every candidate; None for a sweep without grids."""
    runs = [cell.run for m in state.methods for cell in m.grid if cell.run is not None]
    archive.load(runs, ["validation/accuracy"])
    records = tuple(
        {
            "method": method.name,
            "setting": describe(setting),
            "validation_accuracy": last_validation(cell, archive),
            "chosen": "yes" if method.chosen == index else "",
            "state": cell.state,
            "run": "" if cell.run is None else cell.run.id,
        }
        for method in state.methods
        for index, (setting, cell) in enumerate(zip(method.candidates, method.grid, strict=False))
    )
    if not records:
        return None
    return Table(
        file_name("grid", state.name, state.benchmark),
        "How the settings were chosen: the last validation accuracy of each candidate, seed 0.",
        COLUMNS,
        records,
        Source(state.command(), tuple(run.id for run in runs)),
        folded=True,
    )


def _shown(accuracy: float, state: str) -> str:
    if math.isfinite(accuracy):
        return number(accuracy, 100)
    return "diverged" if state == "done" else state
