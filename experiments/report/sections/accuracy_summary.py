"""A sweep in one table, for the docs: accuracy, intervals, iterations, time, memory, collapse."""

from __future__ import annotations

import math
from collections.abc import Callable

from experiments.report.content import (
    MISSING,
    Column,
    Record,
    Source,
    Table,
    file_name,
    number,
    number_column,
    plus_minus,
    text_column,
)
from experiments.report.request import Request
from experiments.report.sections.accuracy import MIB
from experiments.report.sections.accuracy_records import (
    accuracy_records,
    differences,
    explanations,
)
from experiments.report.summary import DROP
from experiments.report.sweep_state import SweepState


def summary_table(state: SweepState, request: Request) -> Table | None:
    """None while no final run is complete."""
    records = accuracy_records(state, request)
    runs = tuple(run.id for method in state.methods for run in method.runs)
    if not runs:
        return None
    first, equal = state.methods[0].name, max(r["equal_iterations"] for r in records)
    columns = [
        text_column("method", "label"),
        text_column("setting", "setting"),
        Column("seeds", lambda r: f"{r['seeds']}/{r['seeds_planned']}"),
        Column("test accuracy, %", _over_tasks),
        Column("95 % over seeds", lambda r: number(r["test_half_width_seeds"], 100)),
        Column(f"{first} leads by", _lead("lead")),
        Column("early stopped, %", lambda r: number(r["early_stopped_mean"], 100)),
        Column(f"{first} then leads by", _lead("early_stopped_lead")),
        Column(f"at {equal} iterations, %", lambda r: number(r["equal_mean"], 100)),
        number_column("outer iterations", "iterations", digits=0),
        number_column("s an outer step", "step_cpu_seconds", digits=3),
        number_column("peak, MiB", "tensor_bytes", 1 / MIB),
        Column("collapsed", _collapsed),
    ]
    if not equal:
        del columns[8]
    if not any(math.isfinite(record["early_stopped_mean"]) for record in records):
        del columns[6:8]
    return Table(
        file_name("summary", state.name, state.benchmark),
        f"Everything in one table, {state.benchmark}, sweep {state.name}.",
        tuple(columns),
        records,
        Source(state.command(), runs),
        (*_notes(request, state), *explanations(records)[1:], *differences(state)),
        folded=True,
    )


def _over_tasks(record: Record) -> str:
    if not record["seeds"]:
        return "missing"
    return plus_minus(record["test_mean"], record["test_half_width_tasks"], 100)


def _lead(what: str) -> Callable[[Record], str]:
    return lambda r: plus_minus(r[f"{what}_mean"], r[f"{what}_half_width"], 100)


def _collapsed(record: Record) -> str:
    if not record["seeds"]:
        return MISSING
    gone = f", {record['diverged']} diverged" if record["diverged"] else ""
    return f"{record['collapsed']} of {record['seeds']}{gone}"


def _notes(request: Request, state: SweepState) -> list[str]:
    runs = request.summaries([run for method in state.methods for run in method.runs])
    tasks = sorted({str(run.run.settings.get("test_tasks")) for run in runs})
    return [
        f"Test accuracy: mean over seeds; ±: 95 % over the {' or '.join(tasks)} test tasks of a run"
        " (mean over seeds). 95 % over seeds: half width by Student's t. Leads by: points, with the"
        " 95 % interval of the differences seed by seed (Student's t): methods see the same tasks"
        " where they have the same seed. Outer step: CPU seconds,"
        " median. Peak: of live tensors in an outer step. Collapsed: validation fell by more than"
        f" {100 * DROP:.0f} points from its best within the budget."
    ]
