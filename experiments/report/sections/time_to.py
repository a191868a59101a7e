"""Seconds to 0.90 of the best validation accuracy of all methods (Yang et al. 2025, Table 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.report.content import (
    MISSING,
    Column,
    Record,
    Source,
    Table,
    file_name,
    plus_minus,
    text_column,
)
from experiments.report.curves import first_reached
from experiments.report.differences import run_list
from experiments.report.request import Request
from experiments.report.summary import Summary
from experiments.report.sweep_state import SweepState
from experiments.statistics import seeds_mean

SHARE = 0.90
COLUMNS = (
    text_column("method", "method"),
    Column("reached by", lambda r: f"{r['reached']} of {r['seeds']}"),
    Column("seconds", lambda r: _shown(r, "seconds", 1), lambda r: _speed(r)),
    Column("outer iterations", lambda r: _shown(r, "iterations", 0)),
    text_column("runs", "runs"),
)


def time_table(state: SweepState, request: Request) -> Table | None:
    """None while no method has a validation."""
    runs = {m.name: request.summaries(m.runs) for m in state.methods}
    bests = {name: seeds_mean([run.best for run in of]).mean for name, of in runs.items() if of}
    finite = {name: best for name, best in bests.items() if math.isfinite(best)}
    if not finite:
        return None
    leader = max(finite, key=lambda name: finite[name])
    threshold = SHARE * finite[leader]
    records = tuple(_record(name, of, threshold) for name, of in runs.items() if of)
    note = (
        f"The threshold is {100 * threshold:.1f} %: {SHARE} of {100 * finite[leader]:.1f} %, the"
        f" best validation accuracy of {leader}, the highest mean over seeds of all methods here"
        f"{_so_far(state)}. Means over the seeds that reach it, with the 95 % interval over seeds."
        " Only validations within the budget count, and they are the resolution. ≤: at a run's"
        " first validation already."
    )
    return Table(
        file_name("time", state.name, state.benchmark),
        f"Seconds of training to {SHARE:.2f} of the best validation accuracy, {state.benchmark}.",
        COLUMNS,
        records,
        Source(state.command(), tuple(run.run.id for of in runs.values() for run in of)),
        (note,),
    )


def _record(name: str, runs: Sequence[Summary], threshold: float) -> Record:
    scores = [[point.score for point in run.within] for run in runs]
    at = [[point.seconds for point in run.within] for run in runs]
    steps = [[float(point.iteration) for point in run.within] for run in runs]
    seconds = [first_reached(curve, threshold) for curve in zip(at, scores, strict=True)]
    iterations = [first_reached(curve, threshold) for curve in zip(steps, scores, strict=True)]
    time = seeds_mean([value for value in seconds if value is not None])
    count = seeds_mean([value for value in iterations if value is not None])
    return {
        "method": name,
        "threshold": threshold,
        "seeds": len(runs),
        "reached": sum(value is not None for value in seconds),
        "seconds": time.mean,
        "seconds_half_width": time.half_width,
        "iterations": count.mean,
        "iterations_half_width": count.half_width,
        "at_first_validation": any(score[:1] and score[0] >= threshold for score in scores),
        "runs": run_list(run.run.id for run in runs),
    }


def _shown(record: Record, key: str, digits: int) -> str:
    text = plus_minus(record[key], record[f"{key}_half_width"], digits=digits)
    return f"≤ {text}" if record["at_first_validation"] and text != MISSING else text


def _speed(record: Record) -> float:
    """The fastest is the best of those of which every seed reaches the threshold.

    In whole seconds: a validation comes after the step in which it is due, and those who are there
    at the same validation are equally fast.
    """
    return -float(round(record["seconds"])) if record["reached"] == record["seeds"] else math.nan


def _so_far(state: SweepState) -> str:
    missing = sum(len(method.finals) - len(method.runs) for method in state.methods)
    return f" so far ({missing} final runs are missing)" if missing else ""
