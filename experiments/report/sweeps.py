"""A sweep on a benchmark: accuracy (Yang et al. 2025, Table 1), curves (Fig. 1), seconds to an
accuracy (Table 2), cost, how the settings were chosen, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from experiments.report import content
from experiments.report.content import UNTOLD, Column, Figure, Items, Record, Section, Source, Table
from experiments.report.figures import curves
from experiments.report.summary import (
    DROP,
    MethodState,
    Request,
    Summary,
    SweepState,
    difference_lines,
    mean_record,
    run_list,
)
from experiments.statistics import Mean, seeds_mean
from experiments.sweeps.definition import COMPLETED, Published
from experiments.sweeps.listing import Status

SHARE = 0.90
"""Of the best validation accuracy, for the time to it."""

RATIOS = {"ratio": "seconds", "published_ratio": "published_seconds"}
FOLDED_FROM = 13
Found = Mapping[str, Sequence[Summary]]
"""The complete final runs by method."""


def sections(request: Request) -> list[Section]:
    """One for each sweep and benchmark that has runs; those of regressions have no accuracies."""
    return [_section(state) for state in request.sweeps if state.attempts and not state.regression]


def _section(state: SweepState) -> Section:
    found = {method.name: list(map(Summary, method.runs)) for method in state.methods}
    records = [_record(state, method, found) for method in state.methods]
    missing, records = _missing_seeds(records), [r for r in records if r["seeds"]] or records
    items: list[Table | Figure] = [
        _summary_table(state, records, found, missing), *curves(state.benchmark, found),
        *_time_table(state, found), *_missing_table(state),
    ]  # fmt: skip
    source = Source(state.command(), [run.id for run in state.runs])
    items = [replace(item, name=content.file_name(item.name, state.name, state.benchmark),
                     source=source if item.source is UNTOLD else item.source)
             for item in items]  # fmt: skip
    done = sum(cell.state == COMPLETED for cell in state.cells)
    text = f"{done} of {len(state.cells)} cells are complete."
    return Section(f"{state.benchmark}, sweep {state.name}", [text], items)


# Means over seeds


def _record(state: SweepState, method: MethodState, found: Found) -> Record:
    """Raw means over a method's final runs, and how far the first method is ahead of it."""
    runs, first = found[method.name], found[state.methods[0].name]
    differs = bool(difference_lines("", method.runs))
    # the outer iteration that other methods were tested at too; 0: none
    at = max((step for run in runs for step in run.run.counts("test_at")), default=0)
    return {
        "method": method.name,
        "label": method.name + " †" * differs,
        "setting": method.setting,
        "seeds_planned": len(method.finals),
        "differs": differs,
        "equal_iterations": at,
        **mean_record(
            runs,
            equal=seeds_mean([run.tests[at] for run in runs if at in run.tests]),
            lead=_lead(runs, first, "test"),
            early_stopped_lead=_lead(runs, first, "early_stopped"),
        ),
        **_published(state, method.name),
    }


def _published(state: SweepState, name: str) -> Record:
    """What the paper prints of a method here, or nan."""
    paper = state.published.get(name, Published(math.nan, math.nan, math.nan))
    return {"published_mean": paper.accuracy, "published_half_width": paper.half_width,
            "published_seconds": paper.seconds}  # fmt: skip


def _lead(runs: Sequence[Summary], first: Sequence[Summary], score: str) -> Mean:
    """Their score minus that of these runs, seed by seed: equal seeds see equal tasks."""
    theirs = {run.run.seed: getattr(run, score) for run in first if runs is not first}
    return seeds_mean([theirs[run.run.seed] - getattr(run, score)
                       for run in runs if run.run.seed in theirs])  # fmt: skip


# Tables of them


def _summary_table(
    state: SweepState, records: Sequence[Record], found: Found, missing: Sequence[str]
) -> Table:
    """What the docs show: accuracy, who is ahead, cost, collapse; what is missing is a note."""
    first = state.methods[0].name
    equal = max((record["equal_iterations"] for record in records), default=0)
    stopped = any(math.isfinite(record["early_stopped_mean"]) for record in records)
    heads = [
        *content.texts(label="method", setting="setting"),
        Column("seeds", lambda r: f"{r['seeds']}/{r['seeds_planned']}"),
        Column("test accuracy, %", _accuracy, _best("test")),
        content.number("95 % over seeds", "test_half_width", 100),
        content.mean("the paper, %", "published", 1),
        content.mean("behind by", "lead"),
        Column("early stopped, %", lambda r: content.rounded(r["early_stopped_mean"], 100),
               _best("early_stopped")),
        content.mean("then behind by", "early_stopped_lead"),
        content.number(f"at {equal} iterations, %", "equal_mean", 100),
        content.number("outer iterations", "iterations_mean", digits=0),
        content.number("s an outer step", "step_cpu_seconds_mean", digits=3),
        content.number("peak, MiB", "tensor_bytes", 1 / content.MIB),
        Column("collapsed", _collapsed),
    ]  # fmt: skip
    tasks = sorted({str(run.run.settings.get("test_tasks")) for of in found.values() for run in of})
    notes = [
        "Test accuracy: at the end of a run's budget, mean over seeds; ±: 95 % over the"
        f" {' or '.join(tasks)} test tasks of a run (mean over seeds). 95 % over seeds: half width"
        f" by Student's t. Behind by: points behind {first}, with the 95 % interval of the"
        " differences seed by seed (Student's t): methods see the same tasks where they have the"
        " same seed. Outer step: CPU seconds, median. Peak: of live tensors in an outer step."
        f" Collapsed: validation fell by more than {100 * DROP:.0f} points from its best within the"
        " budget."
    ]
    if stopped:
        notes.append("Early stopped: test accuracy of theta at a run's best validation within the"
                     " budget, mean over seeds.")  # fmt: skip
    return Table(
        "summary",
        f"Test accuracy and cost, {state.benchmark}, sweep {state.name}.",
        content.told(heads, records), records,
        notes=[*notes, *missing, *_candidates(state), *_differences(state)],
    )  # fmt: skip


def _best(key: str) -> Callable[[Record], float]:
    """Bold is for rows without missing seeds."""
    return lambda r: float(r[f"{key}_mean"]) if r["seeds"] == r["seeds_planned"] else math.nan


def _accuracy(record: Record) -> str:
    shown = content.plus_minus(record["test_mean"], record["within_run_mean"], 100)
    return shown if record["seeds"] else "missing"


def _collapsed(record: Record) -> str:
    if not record["seeds"]:
        return content.MISSING
    gone = f", {record['diverged']} diverged" if record["diverged"] else ""
    return f"{record['collapsed']} of {record['seeds']}{gone}"


def _missing_seeds(records: Sequence[Record]) -> list[str]:
    """Which of the means are of fewer seeds than planned."""
    missing = [r for r in records if r["seeds"] < r["seeds_planned"]]
    told = ", ".join(f"{r['method']} {r['seeds_planned'] - r['seeds']}" for r in missing)
    return [
        *([f"Missing seeds: {told}; the commands are below."] if missing else []),
        *content.fewer_lines(records, "test", "early_stopped", "validation"),
        *(f"{r['method']}: at {r['equal_iterations']} iterations only {r['equal_seeds']} of"
          f" {r['seeds']} seeds have a test accuracy"
          for r in records if r["equal_iterations"] and 0 < r["equal_seeds"] < r["seeds"]),
    ]  # fmt: skip


def _candidates(state: SweepState) -> list[str]:
    """What the settings were chosen by, a line for all methods."""

    def shown(cell: Status) -> str:
        if cell.run is None:
            return cell.state
        last = cell.run.last_validation
        return content.rounded(last, 100) if math.isfinite(last) else "diverged"

    told = "; ".join(f"{method.name} {', '.join(map(shown, method.grid))}"
                     for method in state.methods if method.grid)  # fmt: skip
    note = "Setting: the best last validation accuracy of a grid, %, seed 0. In the grid's order: "
    return [f"{note}{told}."] if told else []


def _differences(state: SweepState) -> list[str]:
    """Within each mean, and between the means."""
    lines = [f"† {line}" for method in state.methods
             for line in difference_lines(method.name, method.runs)]  # fmt: skip
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


# Seconds to an accuracy


def _time_table(state: SweepState, found: Found) -> Items:
    """Nothing while no method has a validation."""
    bests = {name: seeds_mean([run.validation for run in of]).mean for name, of in found.items()}
    bests = {name: best for name, best in bests.items() if math.isfinite(best)}
    if not bests:
        return
    leader = max(bests, key=lambda name: bests[name])
    highest = bests[leader]
    missing = sum(len(method.finals) - len(method.runs) for method in state.methods)
    so_far = f" so far ({missing} final runs are missing)" if missing else ""
    note = (
        f"The threshold is {100 * SHARE * highest:.1f} %: {SHARE} of {100 * highest:.1f} %, the"
        f" best validation accuracy of {leader}, the highest mean over seeds of all methods here"
        f"{so_far}. Means over the seeds that reach it, with the 95 % interval over seeds."
        " Only validations within the budget count, and they are the resolution. ≤: at a run's"
        f" first validation already. Ratio: to the seconds of {next(n for n in found if found[n])}."
    )
    heads = (
        *content.texts("method"),
        Column("reached by", lambda r: f"{r['reached']} of {r['seeds']}"),
        Column("seconds", lambda r: _shown_time(r, "seconds", 1), _speed),
        Column("outer iterations", lambda r: _shown_time(r, "iterations", 0)),
        content.number("ratio", "ratio", digits=2),
        *([content.number("the paper's seconds", "published_seconds", digits=0),
           content.number("the paper's ratio", "published_ratio", digits=2)]
          if state.published else ()),
        *content.texts("runs"),
    )  # fmt: skip
    caption = f"Seconds of training to {SHARE:.2f} of the best validation accuracy, "
    made = [{**_time_record(name, of, SHARE * highest), **_published(state, name)}
            for name, of in found.items() if of]  # fmt: skip
    records = [{**record, **{ratio: record[key] / (made[0][key] or math.nan)
                             for ratio, key in RATIOS.items()}}
               for record in made]  # fmt: skip
    yield Table("time", f"{caption}{state.benchmark}.", heads, records, notes=[note])


def _time_record(name: str, runs: Sequence[Summary], threshold: float) -> Record:
    at = [(run.within["score"] >= threshold).to_numpy().nonzero()[0] for run in runs]
    firsts = [run.within.iloc[n[0]] for run, n in zip(runs, at, strict=True) if len(n)]
    seconds = seeds_mean([point["seconds"] for point in firsts])
    iterations = seeds_mean([float(point["iteration"]) for point in firsts])
    return {
        "method": name, "threshold": threshold, "seeds": len(runs), "reached": len(firsts),
        "seconds": seconds.mean, "seconds_half_width": seconds.half_width,
        "iterations": iterations.mean, "iterations_half_width": iterations.half_width,
        "at_first_validation": any(n[0] == 0 for n in at if len(n)),
        "runs": run_list(run.run.id for run in runs),
    }  # fmt: skip


def _shown_time(record: Record, key: str, digits: int) -> str:
    text = content.plus_minus(record[key], record[f"{key}_half_width"], digits=digits)
    return f"≤ {text}" if record["at_first_validation"] and text != content.MISSING else text


def _speed(record: Record) -> float:
    """The fastest is the best of those of which every seed reaches the threshold.

    In whole seconds: a validation comes after the step in which it is due, and those who are there
    at the same validation are equally fast.
    """
    if record["reached"] < record["seeds"] or not math.isfinite(record["seconds"]):
        return math.nan
    return -float(round(record["seconds"]))


# The cells


def _missing_table(state: SweepState) -> Items:
    """Every incomplete cell with its command; nothing where all are done."""
    cells = [cell for cell in state.cells if cell.state != COMPLETED]
    if not cells:
        return
    records = [
        {"cell": cell.name, "state": cell.state, "why": cell.note,
         "attempts": run_list(run.id for run in cell.runs),
         "command": state.command("--cell", cell.name)}
        for cell in cells
    ]  # fmt: skip
    yield Table(
        "missing",
        f"Missing: {len(cells)} of {len(state.cells)} cells. One command fills all of them:"
        f" {state.command()}",
        content.texts("cell", "state", "why", "attempts", "command"), records,
        Source(state.command(), [run.id for cell in cells for run in cell.runs]),
        folded=len(cells) >= FOLDED_FROM,
    )  # fmt: skip
