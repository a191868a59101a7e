"""The rows of a sweep's accuracy and cost tables, and the lines below them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from experiments.report.content import Record
from experiments.report.differences import difference_lines, run_list
from experiments.report.request import Request
from experiments.report.summary import DROP, Summary
from experiments.report.sweep_state import MethodState, SweepState
from experiments.statistics import Mean, seeds_mean

DIFFERS = " †"
EARLY = (
    "Early stopped: test accuracy of theta at a run's best validation within the budget, mean and"
    " 95 % interval over seeds."
)


def accuracy_records(state: SweepState, request: Request) -> tuple[Record, ...]:
    """One a method: raw means over its final runs, and how far it is from the first method."""
    runs = [request.summaries(method.runs) for method in state.methods]
    return tuple(
        {**_record(method, own), **_distance(own, runs[0])}
        for method, own in zip(state.methods, runs, strict=True)
    )


def _distance(runs: Sequence[Summary], first: Sequence[Summary]) -> Record:
    """How far the first method is ahead, at the end of the budget and with early stopping."""
    test = _lead(runs, first, attrgetter("test"))
    stopped = _lead(runs, first, attrgetter("early_stopped"))
    return {
        "lead_mean": test.mean,
        "lead_half_width": test.half_width,
        "lead_seeds": test.number,
        "early_stopped_lead_mean": stopped.mean,
        "early_stopped_lead_half_width": stopped.half_width,
    }


def _lead(
    runs: Sequence[Summary], first: Sequence[Summary], score: Callable[[Summary], float]
) -> Mean:
    """Their score minus that of these runs, seed by seed: equal seeds see equal tasks."""
    theirs = {run.run.settings.get("seed"): score(run) for run in first if runs is not first}
    own = [(run.run.settings.get("seed"), score(run)) for run in runs]
    return seeds_mean([theirs[seed] - value for seed, value in own if seed in theirs])


def _record(method: MethodState, runs: Sequence[Summary]) -> Record:
    return {
        "method": method.name,
        "label": method.name + DIFFERS * bool(difference_lines("", method.runs)),
        "setting": method.setting if method.chosen is not None else "its grid is not complete",
        "seeds": len(runs),
        "seeds_planned": len(method.finals),
        **_scores(runs),
        "collapsed": sum(run.collapsed for run in runs),
        "collapsed_after_budget": sum(run.collapsed_later for run in runs),
        "diverged": sum(bool(run.diverged) for run in runs),
        **_costs(runs),
        "runs": run_list(run.run.id for run in runs),
        "differs": bool(difference_lines("", method.runs)),
    }


def _scores(runs: Sequence[Summary]) -> Record:
    test = seeds_mean([run.test for run in runs])
    stopped = seeds_mean([run.early_stopped for run in runs])
    validation = seeds_mean([run.best for run in runs])
    at = max((_equal_at(run) for run in runs), default=0)
    equal = seeds_mean([run.tests[at][0] for run in runs if at in run.tests])
    return {
        "test_seeds": test.number,
        "test_mean": test.mean,
        "test_half_width_seeds": test.half_width,
        "test_half_width_tasks": seeds_mean([run.test_half_width for run in runs]).mean,
        "early_stopped_mean": stopped.mean,
        "early_stopped_half_width_seeds": stopped.half_width,
        "equal_iterations": at,
        "equal_mean": equal.mean,
        "equal_half_width_seeds": equal.half_width,
        "equal_seeds": equal.number,
        "validation_mean": validation.mean,
        "validation_half_width_seeds": validation.half_width,
    }


def _costs(runs: Sequence[Summary]) -> Record:
    return {
        "iterations": seeds_mean([_float(run.iterations) for run in runs]).mean,
        "step_cpu_seconds": seeds_mean([run.step_cpu_seconds for run in runs]).mean,
        "step_seconds": seeds_mean([run.step_seconds for run in runs]).mean,
        "tensor_bytes": _largest([run.tensor_bytes for run in runs]),
        "process_bytes": _largest([run.process_bytes for run in runs]),
    }


def _equal_at(run: Summary) -> int:
    """The outer iteration that other methods were tested at too; 0: none."""
    return max(run.run.settings.get("test_at") or [0])


def explanations(records: Sequence[Record]) -> list[str]:
    """What the columns are, and what is missing in them."""
    lines = [
        "Test accuracy: mean over seeds of each run's test accuracy at the end of its budget, with"
        " the 95 % interval over seeds (Student's t). ± within a run: the mean of the runs' own"
        " 95 % half widths over their test tasks. Best validation: mean over seeds. Collapsed:"
        f" validation fell by more than {100 * DROP:.0f} points from its best within the budget."
    ]
    if any(math.isfinite(record["early_stopped_mean"]) for record in records):
        lines.append(EARLY)
    missing = [r for r in records if r["seeds"] < r["seeds_planned"]]
    if missing:
        told = [f"{r['method']} {r['seeds_planned'] - r['seeds']}" for r in missing]
        lines.append(f"Missing seeds: {', '.join(told)}; the commands are below.")
    lines += [
        f"{r['method']}: only {r['test_seeds']} of {r['seeds']} seeds have a finite test accuracy"
        for r in records if r["test_seeds"] < r["seeds"]
    ]
    lines += [
        f"{r['method']}: at {r['equal_iterations']} iterations only {r['equal_seeds']} of"
        f" {r['seeds']} seeds have a test accuracy"
        for r in records if r["equal_iterations"] and 0 < r["equal_seeds"] < r["seeds"]
    ]
    return lines  # fmt: skip


def differences(state: SweepState) -> list[str]:
    """Within each mean, and between the means."""
    lines = []
    for method in state.methods:
        lines += [f"† {line}" for line in difference_lines(method.name, method.runs)]
    for remark in dict.fromkeys(method.remark for method in state.methods if method.remark):
        named = [method.name for method in state.methods if method.remark == remark]
        lines.append(f"{remark}: {', '.join(named)}")
    codes = {run.code.signature: str(run.code) for m in state.methods for run in m.runs}
    if len(codes) > 1:
        lines.append(
            f"The rows are of {len(codes)} versions of the code ({', '.join(codes.values())});"
            " the list of runs has the version of each."
        )
    return lines


def _largest(values: Sequence[float]) -> float:
    return max([value for value in values if math.isfinite(value)], default=math.nan)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
