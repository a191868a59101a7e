"""A sweep on a benchmark: accuracy (Yang et al. 2025, Table 1), curves (Fig. 1), seconds to an
accuracy (Table 2), cost, how the settings were chosen, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from experiments.report.compare import difference_lines
from experiments.report.content import (
    MIB,
    MISSING,
    Column,
    Figure,
    Record,
    Section,
    Source,
    Table,
    file_name,
    listed,
    mean_column,
    number,
    number_column,
    plus_minus,
    text_column,
    texts,
)
from experiments.report.figures import curve_caption, curve_records, draw_accuracies, draw_curves
from experiments.report.runs import run_list
from experiments.report.summary import DROP, Point, Request, Summary
from experiments.report.sweep_state import COMPLETED, MethodState, SweepState, last_validation
from experiments.statistics import Mean, seeds_mean
from experiments.sweeps.definition import describe

SHARE = 0.90
"""Of the best validation accuracy, for the time to it."""

FOLDED_FROM = 13
DIFFERS = " †"
AVERAGED = {
    "test": "test", "early_stopped": "early_stopped", "validation": "best",
    "within_run": "test_half_width", "step_cpu_seconds": "step_cpu_seconds",
    "step_seconds": "step_seconds", "iterations": "iterations",
}  # fmt: skip
"""What is averaged over seeds, and what it is in a `Summary`."""

Found = Mapping[str, Sequence[Summary]]
"""The complete final runs by method."""


def sections(request: Request) -> list[Section]:
    """One for each sweep and benchmark that has runs."""
    return [_section(state, request) for state in request.sweeps if state.attempts]


def _section(state: SweepState, request: Request) -> Section:
    request.summaries(state.runs)  # all at once
    found = {method.name: request.summaries(method.runs) for method in state.methods}
    records = method_records(state, found)
    items: list[Table | Figure | None] = [
        _summary_table(state, records, found),
        _accuracy_figure(state, found),
        _curves(state, found),
        _time_table(state, found),
        _details_table(state, records),
        _missing_table(state),
        _grid_table(state, request),
    ]
    done = sum(cell.state == COMPLETED for cell in state.cells)
    text = f"{done} of {len(state.cells)} cells are complete."
    kept = tuple(item for item in items if item is not None)
    return Section(f"{state.benchmark}, sweep {state.name}", (text,), kept)


def _source(state: SweepState) -> Source:
    return Source(state.command(), tuple(run.id for run in state.runs))


def _named(what: str, state: SweepState) -> str:
    return file_name(what, state.name, state.benchmark)


def _table(
    what: str, caption: str, state: SweepState, columns: Sequence[Column],
    records: Sequence[Record], notes: Sequence[str] = (), folded: bool = False,
    source: Source | None = None,
) -> Table:  # fmt: skip
    return Table(_named(what, state), caption, tuple(columns), tuple(records),
                 source or _source(state), tuple(notes), folded)  # fmt: skip


# Means over seeds


def method_records(state: SweepState, found: Found) -> tuple[Record, ...]:
    """One a method: raw means over its final runs, and how far the first method is ahead of it."""
    first = found[state.methods[0].name]
    return tuple(_record(method, found[method.name], first) for method in state.methods)


def _record(method: MethodState, runs: Sequence[Summary], first: Sequence[Summary]) -> Record:
    differs = bool(difference_lines("", method.runs))
    at = max((_equal_at(run) for run in runs), default=0)
    means = {name: seeds_mean([getattr(run, what) for run in runs])
             for name, what in AVERAGED.items()}  # fmt: skip
    means["equal"] = seeds_mean([run.tests[at] for run in runs if at in run.tests])
    means["lead"] = _lead(runs, first, attrgetter("test"))
    means["early_stopped_lead"] = _lead(runs, first, attrgetter("early_stopped"))
    return {
        "method": method.name,
        "label": method.name + DIFFERS * differs,
        "setting": method.setting if method.chosen is not None else "its grid is not complete",
        "seeds": len(runs),
        "seeds_planned": len(method.finals),
        "runs": run_list(run.run.id for run in runs),
        "differs": differs,
        "collapsed": sum(run.collapsed for run in runs),
        "collapsed_after_budget": sum(run.collapsed_later for run in runs),
        "diverged": sum(bool(run.diverged) for run in runs),
        "tensor_bytes": _largest(run.tensor_bytes for run in runs),
        "process_bytes": _largest(run.process_bytes for run in runs),
        "equal_iterations": at,
        **{f"{name}_mean": mean.mean for name, mean in means.items()},
        **{f"{name}_half_width": mean.half_width for name, mean in means.items()},
        **{f"{name}_seeds": mean.number for name, mean in means.items()},
    }


def _equal_at(run: Summary) -> int:
    """The outer iteration that other methods were tested at too; 0: none."""
    return max(run.run.setting_counts("test_at"), default=0)


def _lead(
    runs: Sequence[Summary], first: Sequence[Summary], score: Callable[[Summary], float]
) -> Mean:
    """Their score minus that of these runs, seed by seed: equal seeds see equal tasks."""
    theirs = {run.run.seed: score(run) for run in first if runs is not first}
    return seeds_mean([theirs[r.run.seed] - score(r) for r in runs if r.run.seed in theirs])


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


# Tables of them


def _summary_table(state: SweepState, records: tuple[Record, ...], found: Found) -> Table:
    """What the docs show: accuracy, who is ahead, cost, collapse."""
    first = state.methods[0].name
    equal = max((record["equal_iterations"] for record in records), default=0)
    columns = [
        text_column("method", "label"),
        text_column("setting", "setting"),
        Column("seeds", lambda r: f"{r['seeds']}/{r['seeds_planned']}"),
        Column("test accuracy, %", _accuracy, _best("test")),
        number_column("95 % over seeds", "test_half_width", 100),
        mean_column(f"{first} leads by", "lead", 100),
        Column("early stopped, %", lambda r: number(r["early_stopped_mean"], 100),
               _best("early_stopped")),
        mean_column(f"{first} then leads by", "early_stopped_lead", 100),
        number_column(f"at {equal} iterations, %", "equal_mean", 100),
        number_column("outer iterations", "iterations_mean", digits=0),
        number_column("s an outer step", "step_cpu_seconds_mean", digits=3),
        number_column("peak, MiB", "tensor_bytes", 1 / MIB),
        Column("collapsed", _collapsed),
    ]  # fmt: skip
    stopped = any(math.isfinite(record["early_stopped_mean"]) for record in records)
    kept = [c for n, c in enumerate(columns) if (equal or n != 8) and (stopped or n not in (6, 7))]
    tasks = sorted({str(run.run.settings.get("test_tasks")) for of in found.values() for run in of})
    notes = [
        "Test accuracy: at the end of a run's budget, mean over seeds; ±: 95 % over the"
        f" {' or '.join(tasks)} test tasks of a run (mean over seeds). 95 % over seeds: half width"
        " by Student's t. Leads by: points, with the 95 % interval of the differences seed by seed"
        " (Student's t): methods see the same tasks where they have the same seed. Outer step: CPU"
        " seconds, median. Peak: of live tensors in an outer step. Collapsed: validation fell by"
        f" more than {100 * DROP:.0f} points from its best within the budget."
    ]
    if stopped:
        notes.append("Early stopped: test accuracy of theta at a run's best validation within the"
                     " budget, mean over seeds.")  # fmt: skip
    caption = f"Test accuracy and cost, {state.benchmark}, sweep {state.name}."
    notes += [*_missing_seeds(records), *_differences(state)]
    return _table("summary", caption, state, kept, records, notes)


def _details_table(state: SweepState, records: tuple[Record, ...]) -> Table | None:
    """What else is known of the same runs; None while there are none."""
    if not state.runs:
        return None
    columns = (
        text_column("method", "label"),
        mean_column("test accuracy, %", "test", 100),
        mean_column("early stopped, %", "early_stopped", 100),
        mean_column("best validation, %", "validation", 100, best=_best("validation")),
        number_column("outer step, ms of CPU", "step_cpu_seconds_mean", 1e3),
        number_column("outer step, ms of wall", "step_seconds_mean", 1e3),
        number_column("peak of the process, MiB", "process_bytes", 1 / MIB, 0),
        Column("collapsed later", lambda r: _count(r, "collapsed_after_budget")),
        text_column("runs", "runs"),
    )
    note = (
        "±: 95 % over seeds (Student's t). Best validation: within the budget. Outer step: mean"
        " over seeds of the median over a run's steps, without loading of data and validation."
        " Peak: the largest of the seeds. Collapsed later: only after the budget, where some"
        " methods go on to an iteration at which all are compared."
    )
    caption = f"Intervals over seeds, and other costs, {state.benchmark}, sweep {state.name}."
    notes = [note, *_differences(state)]
    return _table("details", caption, state, columns, records, notes, folded=True)


def _best(key: str) -> Callable[[Record], float]:
    """Bold is for rows without missing seeds."""
    return lambda r: float(r[f"{key}_mean"]) if r["seeds"] == r["seeds_planned"] else math.nan


def _accuracy(record: Record) -> str:
    shown = plus_minus(record["test_mean"], record["within_run_mean"], 100)
    return shown if record["seeds"] else "missing"


def _collapsed(record: Record) -> str:
    gone = f", {record['diverged']} diverged" if record["diverged"] else ""
    return _count(record, "collapsed") + gone


def _count(record: Record, what: str) -> str:
    return f"{record[what]} of {record['seeds']}" if record["seeds"] else MISSING


def _missing_seeds(records: Sequence[Record]) -> list[str]:
    """Which of the means are of fewer seeds than planned."""
    missing = [r for r in records if r["seeds"] < r["seeds_planned"]]
    told = ", ".join(f"{r['method']} {r['seeds_planned'] - r['seeds']}" for r in missing)
    lines = [f"Missing seeds: {told}; the commands are below."] if missing else []
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


def _differences(state: SweepState) -> list[str]:
    """Within each mean, and between the means."""
    lines = []
    for method in state.methods:
        lines += [f"† {line}" for line in difference_lines(method.name, method.runs)]
    for remark in dict.fromkeys(method.remark for method in state.methods if method.remark):
        named = [method.name for method in state.methods if method.remark == remark]
        lines.append(f"{remark}: {', '.join(named)}")
    codes = {run.code.signature: str(run.code) for run in state.runs}
    if len(codes) > 1:
        lines.append(
            f"The rows are of {len(codes)} versions of the code ({', '.join(codes.values())});"
            " the list of runs has the version of each."
        )
    return lines


# Figures


def _accuracy_figure(state: SweepState, found: Found) -> Figure | None:
    runs = {name: of for name, of in found.items() if any(math.isfinite(run.test) for run in of)}
    if not runs:
        return None
    records = tuple(
        {"method": name, "run": run.run.id, "seed": run.run.seed, "test_accuracy": run.test,
         "half_width": run.test_half_width}
        for name, of in runs.items() for run in of
    )  # fmt: skip
    return Figure(
        _named("test", state),
        f"{state.benchmark}. Test accuracy at the end of the budget. Large mark and bar: mean over"
        " seeds with its 95 % interval (Student's t; none for one seed); small marks: the seeds.",
        lambda: draw_accuracies(runs), records, _source(state),
        listed(name for name in found if name not in runs),
    )  # fmt: skip


def _curves(state: SweepState, found: Found) -> Figure | None:
    curves = {name: runs for name, runs in found.items() if any(run.points for run in runs)}
    if not curves:
        return None
    budgets = {run.run.setting_number("budget") for of in curves.values() for run in of}
    budget = budgets.pop() if len(budgets) == 1 else math.nan
    dotted = " Dotted: the budget, where the test accuracy of the table is taken."
    return Figure(
        _named("curves", state),
        f"{state.benchmark}. {curve_caption(curves, 'accuracy')}{dotted if budget > 0 else ''}",
        lambda: draw_curves(curves, "accuracy", budget), curve_records(curves), _source(state),
        listed(name for name in found if name not in curves),
    )  # fmt: skip


# Seconds to an accuracy


def _time_table(state: SweepState, found: Found) -> Table | None:
    """None while no method has a validation."""
    bests = {name: seeds_mean([run.best for run in runs]).mean for name, runs in found.items()}
    finite = {name: best for name, best in bests.items() if math.isfinite(best)}
    if not finite:
        return None
    leader = max(finite, key=lambda name: finite[name])
    threshold = SHARE * finite[leader]
    missing = sum(len(method.finals) - len(method.runs) for method in state.methods)
    so_far = f" so far ({missing} final runs are missing)" if missing else ""
    note = (
        f"The threshold is {100 * threshold:.1f} %: {SHARE} of {100 * finite[leader]:.1f} %, the"
        f" best validation accuracy of {leader}, the highest mean over seeds of all methods here"
        f"{so_far}. Means over the seeds that reach it, with the 95 % interval over seeds."
        " Only validations within the budget count, and they are the resolution. ≤: at a run's"
        " first validation already."
    )
    columns = (
        text_column("method", "method"),
        Column("reached by", lambda r: f"{r['reached']} of {r['seeds']}"),
        Column("seconds", lambda r: _shown_time(r, "seconds", 1), _speed),
        Column("outer iterations", lambda r: _shown_time(r, "iterations", 0)),
        text_column("runs", "runs"),
    )
    caption = f"Seconds of training to {SHARE:.2f} of the best validation accuracy, "
    records = [_time_record(name, of, threshold) for name, of in found.items() if of]
    return _table("time", f"{caption}{state.benchmark}.", state, columns, records, [note])


def _time_record(name: str, runs: Sequence[Summary], threshold: float) -> Record:
    firsts = [_first(run.within, threshold) for run in runs]
    reached = [point for point in firsts if point is not None]
    time = seeds_mean([point.seconds for point in reached])
    count = seeds_mean([float(point.iteration) for point in reached])
    return {
        "method": name,
        "threshold": threshold,
        "seeds": len(runs),
        "reached": len(reached),
        "seconds": time.mean,
        "seconds_half_width": time.half_width,
        "iterations": count.mean,
        "iterations_half_width": count.half_width,
        "at_first_validation": any(
            point is run.within[0] for run, point in zip(runs, firsts, strict=True) if point
        ),
        "runs": run_list(run.run.id for run in runs),
    }


def _first(points: Sequence[Point], threshold: float) -> Point | None:
    """The first validation at or above the threshold."""
    return next((point for point in points if point.score >= threshold), None)


def _shown_time(record: Record, key: str, digits: int) -> str:
    text = plus_minus(record[key], record[f"{key}_half_width"], digits=digits)
    return f"≤ {text}" if record["at_first_validation"] and text != MISSING else text


def _speed(record: Record) -> float:
    """The fastest is the best of those of which every seed reaches the threshold.

    In whole seconds: a validation comes after the step in which it is due, and those who are there
    at the same validation are equally fast.
    """
    if record["reached"] < record["seeds"] or not math.isfinite(record["seconds"]):
        return math.nan
    return -float(round(record["seconds"]))


# The cells


def _missing_table(state: SweepState) -> Table | None:
    """Every incomplete cell with its command; None where all are done."""
    cells = [cell for cell in state.cells if cell.state != COMPLETED]
    if not cells:
        return None
    records = tuple(
        {"cell": cell.name, "state": cell.state, "why": cell.why,
         "attempts": run_list(run.id for run in cell.runs), "command": state.command(cell.name)}
        for cell in cells
    )  # fmt: skip
    return _table(
        "missing",
        f"Missing: {len(cells)} of {len(state.cells)} cells. One command fills all of them:"
        f" {state.command()}",
        state, texts("cell", "state", "why", "attempts", "command"), records,
        folded=len(cells) >= FOLDED_FROM,
        source=Source(state.command(), tuple(run.id for cell in cells for run in cell.runs)),
    )  # fmt: skip


def _grid_table(state: SweepState, request: Request) -> Table | None:
    """The last validation accuracy of every candidate; None for a sweep without grids."""
    runs = [cell.run for m in state.methods for cell in m.grid if cell.run is not None]
    request.archive.load(runs, ["validation/accuracy"])
    records = tuple(
        {
            "method": method.name,
            "setting": describe(setting),
            "validation_accuracy": last_validation(cell, request.archive),
            "chosen": "yes" if method.chosen == index else "",
            "state": cell.state,
            "run": "" if cell.run is None else cell.run.id,
        }
        for method in state.methods
        for index, (setting, cell) in enumerate(zip(method.candidates, method.grid, strict=False))
    )
    if not records:
        return None
    method, setting, chosen, run = texts("method", "setting", "chosen", "run")
    return _table(
        "grid",
        "How the settings were chosen: the last validation accuracy of each candidate, seed 0.",
        state, (method, setting, Column("last validation, %", _shown_candidate), chosen, run),
        records, folded=True, source=Source(state.command(), tuple(run.id for run in runs)),
    )  # fmt: skip


def _shown_candidate(record: Record) -> str:
    if math.isfinite(record["validation_accuracy"]):
        return number(record["validation_accuracy"], 100)
    return "diverged" if record["state"] == COMPLETED else str(record["state"])
