"""A sweep's accuracy and cost tables (Yang et al. 2025, Table 1, on the sweep's benchmark)."""

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
from experiments.report.sections.accuracy_records import (
    accuracy_records,
    differences,
    explanations,
)
from experiments.report.sweep_state import SweepState

MIB = 2.0**20


def accuracy_table(state: SweepState, request: Request) -> Table:
    """Test accuracy of the chosen settings."""
    records = accuracy_records(state, request)
    equal = max((record["equal_iterations"] for record in records), default=0)
    columns = [
        text_column("method", "label"),
        text_column("setting", "setting"),
        Column("seeds", lambda r: f"{r['seeds']}/{r['seeds_planned']}"),
        Column("test accuracy, %", _over_seeds("test"), _best("test_mean")),
        Column("± within a run", lambda r: number(r["test_half_width_tasks"], 100)),
        Column("early stopped, %", _over_seeds("early_stopped"), _best("early_stopped_mean")),
        Column(f"at {equal} iterations, %", _over_seeds("equal"), _best("equal_mean")),
        Column("best validation, %", _over_seeds("validation"), _best("validation_mean")),
        Column("collapsed", _collapsed),
        Column("diverged", _of("diverged")),
        text_column("runs", "runs"),
    ]
    if not equal:
        del columns[6]
    if not any(math.isfinite(record["early_stopped_mean"]) for record in records):
        del columns[5]
    return Table(
        file_name("accuracy", state.name, state.benchmark),
        f"Test accuracy, {state.benchmark}, sweep {state.name}.",
        tuple(columns),
        records,
        _source(state),
        (*explanations(records), *differences(state)),
    )


def cost_table(state: SweepState, request: Request) -> Table | None:
    """Iterations, time and memory of the same runs; None while there are none."""
    if not any(method.runs for method in state.methods):
        return None
    columns = (
        text_column("method", "label"),
        number_column("outer iterations", "iterations", digits=0),
        number_column("outer step, ms of CPU", "step_cpu_seconds", 1e3),
        number_column("outer step, ms of wall", "step_seconds", 1e3),
        number_column("peak of tensors, MiB", "tensor_bytes", 1 / MIB),
        number_column("peak of the process, MiB", "process_bytes", 1 / MIB, 0),
        text_column("runs", "runs"),
    )
    notes = (
        "Outer iterations: mean over seeds, until the budget was spent. Outer step: mean over"
        " seeds of the median over a run's steps, without loading of data and validation. Peaks:"
        " the largest of the seeds; of live tensors in one outer step, and of the whole process.",
    )
    return Table(
        file_name("cost", state.name, state.benchmark),
        f"What an outer step costs, {state.benchmark}, sweep {state.name}.",
        columns,
        accuracy_records(state, request),
        _source(state),
        (*notes, *differences(state)),
    )


def _over_seeds(what: str) -> Callable[[Record], str]:
    def show(record: Record) -> str:
        if what == "test" and not record["seeds"]:
            return "missing"
        return plus_minus(record[f"{what}_mean"], record[f"{what}_half_width_seeds"], 100)

    return show


def _best(key: str) -> Callable[[Record], float]:
    """Bold is for rows without missing seeds."""
    return lambda r: float(r[key]) if r["seeds"] == r["seeds_planned"] else math.nan


def _of(key: str) -> Callable[[Record], str]:
    return lambda r: f"{r[key]} of {r['seeds']}" if r["seeds"] else MISSING


def _collapsed(record: Record) -> str:
    later = record["collapsed_after_budget"]
    return _of("collapsed")(record) + (f" (+{later} after the budget)" if later else "")


def _source(state: SweepState) -> Source:
    runs = tuple(run.id for method in state.methods for run in method.runs)
    return Source(state.command(), runs)
