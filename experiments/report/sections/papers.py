"""The papers' experiments, of which one run holds a whole figure: nothing is averaged over runs.

Memory (Yang et al. 2025, Fig. 2; Rajeswaran et al. 2019, Fig. 2b), error of the hypergradient
(Rajeswaran et al., Fig. 2a), convergence (Yang et al., Theorems 1 and 2, Corollary 1, appendix
B.2): from the metrics and results that `experiments.papers` records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from experiments.report.compare import difference_lines, settings_key
from experiments.report.content import (
    MIB,
    Column,
    Figure,
    Record,
    Section,
    Source,
    Table,
    file_name,
    number,
    number_column,
    plus_minus,
    significant,
    texts,
)
from experiments.report.paper_figures import (
    BOUNDS,
    STEPS,
    Curve,
    Errors,
    Findings,
    Floors,
    Growth,
    Point,
    draw_convergence,
    draw_errors,
    draw_memory,
)
from experiments.report.runs import NO_SERIES, Run, Series, command_of, run_list
from experiments.report.summary import Request
from experiments.statistics import Mean

MOST = 4
"""Runs drawn of one experiment, each of other settings."""

AllSeries = Mapping[str, Series]
Items = list[Table | Figure]


class Shown(NamedTuple):
    """A run that is drawn.

    Attributes:
        suffix: of its files' names, empty for the first.
        notes: what it was run with, and which runs it stands for.
    """

    run: Run
    suffix: str
    notes: tuple[str, ...]

    @property
    def source(self) -> Source:
        """Of its tables and figures."""
        return Source(self.run.command, (self.run.id,))

    def table(self, name: str, caption: str, columns: Sequence[Column],
              records: Sequence[Record], *notes: str) -> Table:  # fmt: skip
        """One of its tables."""
        return Table(f"{name}{self.suffix}", caption, tuple(columns), tuple(records), self.source,
                     (*self.notes, *notes))  # fmt: skip

    def curves(self, name: str, caption: str, rows: Sequence[tuple[Record, Curve]], header: str,
               key: str = "K_", show: Callable[[Any], str] = significant,
               last: Sequence[Column] = (), *notes: str) -> Table:  # fmt: skip
        """A table with a row a curve and a column a step; ``header`` and ``key`` name a step's."""
        steps = sorted({step for _, curve in rows for step in curve})
        heads = [key for key in ("method", "variant", "start", "K") if rows and key in rows[0][0]]
        between = [_value(f"{header}{n}", f"{key}{n}", show) for n in steps]
        records = [{**{f"{key}{n}": curve.get(n, math.nan) for n in steps}, **row}
                   for row, curve in rows]  # fmt: skip
        return self.table(name, caption, [*texts(*heads), *between, *last], records, *notes)

    def figure(self, name: str, caption: str, draw: Callable[[], Drawing],
               records: Iterable[Record]) -> Figure:  # fmt: skip
        """One of its figures."""
        return Figure(f"{name}{self.suffix}", caption, draw, tuple(records), self.source,
                      self.notes)  # fmt: skip


def by_run(
    request: Request, experiment: str, title: str, what: str,
    items: Callable[[Shown, AllSeries], Items],
) -> list[Section]:  # fmt: skip
    """One section: tables and figures of each run shown, or the command that is missing.

    Args:
        request: what was asked.
        experiment: its name in the database.
        title: of the section.
        what: the figures and tables of the papers, where missing.
        items: makes a run's tables and figures from its metrics.
    """
    runs = request.archive.of_experiment(experiment)
    shown, text = _shown(experiment, [run for run in runs if run.complete])
    made = [item for each in shown for item in items(each, request.archive.all_series(each.run))]
    return [Section(title, text, tuple(made) or (_missing(experiment, what, runs),))]


def _shown(experiment: str, runs: list[Run]) -> tuple[list[Shown], tuple[str, ...]]:
    """Of runs of equal settings and seed the newest; the one of default settings first."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault((settings_key(run), run.seed), []).append(run)
    default = command_of(experiment)
    order = sorted(groups.values(), key=lambda g: (g[-1].command == default, runs.index(g[-1])))
    order.reverse()
    found = [Shown(group[-1], f"_{n}" if n else "", _notes(group, n > 0))
             for n, group in enumerate(order[:MOST])]  # fmt: skip
    left = [run.id for group in order[MOST:] for run in group]
    text = (f"Not drawn: runs {run_list(left)}, of still other settings.",) if left else ()
    return found, text


def _notes(group: list[Run], other: bool) -> tuple[str, ...]:
    """Runs of one group, oldest first."""
    newest = group[-1]
    notes = [f"Other settings than above: {newest.command}"] if other else []
    if len(group) > 1:
        older = run_list(run.id for run in group[:-1])
        notes.append(
            f"Run {newest.id} is the newest of {len(group)} runs of equal settings and seed;"
            f" not drawn, and averaged with nothing: {older}."
        )
    return (*notes, *difference_lines("These runs", group))


def _missing(experiment: str, what: str, runs: list[Run]) -> Table:
    """What there is instead of a complete run."""
    command = command_of(experiment)
    last = runs[-1] if runs else None
    why = "" if last is None else f"run {last.id} {last.status}: {last.failure or 'no metrics'}"
    state = "not run" if last is None else last.status.lower()
    record = {"what": what, "state": state, "why": why, "command": command}
    return Table(
        f"missing_{experiment}", f"Missing: no complete run of experiments.papers.{experiment}.",
        texts("what", "state", "why", "command"), (record,),
        Source(command, tuple(run.id for run in runs)),
    )  # fmt: skip


def _curve(series: AllSeries, name: str) -> dict[int, float]:
    return dict(sorted(zip(*series.get(name, NO_SERIES), strict=True)))


def _value(header: str, key: str, show: Callable[[Any], str]) -> Column:
    return Column(header, lambda record: show(record.get(key)))


# Memory and time against inner steps

OURS, CLAIM_AT = "rm_metal/cached", 5
PAPERS = {"yang": ("Yang et al., Fig. 2", ""),
          "rajeswaran": ("Rajeswaran et al., Fig. 2b", "imaml_")}  # fmt: skip
TASK = ("ways", "shots", "queries", "pixels")


def memory(request: Request) -> list[Section]:
    """The figures, and a table each of memory and of time."""
    what = "Yang et al., Fig. 2; Rajeswaran et al., Fig. 2b"
    return by_run(request, "memory", "Memory against inner steps", what, _memory_items)


def _memory_items(shown: Shown, series: AllSeries) -> Items:
    items: Items = []
    for paper, (title, prefix) in PAPERS.items():
        found = _growth(series, prefix, shown.run.setting_counts(f"{prefix}inner_steps"))
        if found:
            settings = shown.run.settings
            ways, shots, queries, pixels = (settings.get(prefix + name) for name in TASK)
            task = (
                f"{ways}-way {shots}-shot, {queries} queries a class, {pixels} x {pixels} pixels,"
                f" CNN4-{settings.get('hidden')}, {settings.get('device')}"
            )
            floor = series.get(f"{prefix}memory/supervised", NO_SERIES).values[-1:]
            items.append(_memory_figure(shown, found, paper, f"{title}: ", task, floor))
            items += [_memory_table(shown, found, paper, f"{title}; {task}", what)
                      for what in ("peak", "seconds")]  # fmt: skip
    return items


def _growth(series: AllSeries, prefix: str, asked: Sequence[int]) -> dict[str, Growth]:
    """By method, such as ``anil/cached``, from the two groups of metrics."""
    found = {}
    for name in series:
        group, _, method = name.partition("/")
        if group == f"{prefix}memory" and "/" in method:
            times = _curve(series, f"{prefix}seconds/{method}")
            points = {k: Point(peak, times.get(k, math.nan))
                      for k, peak in _curve(series, name).items()}  # fmt: skip
            found[method] = Growth(points, [k for k in asked if k not in points])
    return found


def _memory_figure(
    shown: Shown, found: Mapping[str, Growth], paper: str, title: str, task: str,
    floor: Sequence[float],
) -> Figure:  # fmt: skip
    caption = (
        f"{title}peak of live tensors (left) and median time (right) of one task's outer step"
        f" against the inner steps K. {task}, random images."
    )
    records = [
        {"method": name, "K": k, "peak_bytes": point.peak, "seconds": point.seconds}
        for name, each in found.items() for k, point in each.points.items()
    ]  # fmt: skip
    draw = partial(draw_memory, found, floor[0] if floor else None)
    return shown.figure(f"memory_{paper}", caption, draw, records)


def _memory_table(
    shown: Shown, found: Mapping[str, Growth], paper: str, title: str, what: str
) -> Table:
    """A row a method, a column a K; what rm_metal saves at K = 5 beside the memory."""
    is_peak = what == "peak"
    left = [f"{n} at K = {', '.join(map(str, g.left_out))}" for n, g in found.items() if g.left_out]
    last, notes = [], []
    if left:
        limit = shown.run.settings.get("limit_gib")
        notes.append(f"Missing: {'; '.join(left)}: the forecast was above limit_gib={limit};"
                     " a larger one fills them.")  # fmt: skip
    if is_peak and CLAIM_AT in found.get(OURS, Growth({}, [])).points:
        last = [number_column(f"rm_metal below it at K = {CLAIM_AT}, %", "saved", 100, 0)]
        notes.append("rm_metal below it: rm_metal with cached features, the package's default.")
    rows = []
    for name, each in found.items():
        method, _, variant = name.partition("/")
        row: dict[str, Any] = {"method": method, "variant": variant.replace("_", " ")}
        row |= {"saved": _saved(method, each, found)} if is_peak else {}
        values = {k: getattr(point, what) for k, point in each.points.items()}
        rows.append((row, {**values, **dict.fromkeys(each.left_out, math.nan)}))
    unit = "Peak of live tensors, MiB" if is_peak else "Seconds of one task's outer step"
    return shown.curves(
        f"memory_{paper}_{what}", f"{unit}, against inner steps K. {title}.", rows, "K = ", "K_",
        (lambda peak: number(peak, 1 / MIB)) if is_peak else significant, last, *notes,
    )  # fmt: skip


def _saved(method: str, each: Growth, found: Mapping[str, Growth]) -> float:
    """Share of this method's memory that rm_metal does without."""
    ours = found.get(OURS, Growth({}, [])).points.get(CLAIM_AT)
    theirs = each.points.get(CLAIM_AT)
    if ours is None or theirs is None or not theirs.peak or method == "rm_metal":
        return math.nan
    return 1 - ours.peak / theirs.peak


# Error of the hypergradient


def hypergradient(request: Request) -> list[Section]:
    """The figure, and a table a problem."""
    what = "Rajeswaran et al., Fig. 2a, and the same for Algorithm 1 of Yang et al."
    return by_run(request, "hypergradient", "Error of the hypergradient", what, _error_items)


def _error_items(shown: Shown, series: AllSeries) -> Items:
    errors: dict[str, dict[str, Curve]] = {}
    for name in series:
        group, _, rest = name.partition("/")
        problem, _, method = rest.partition("/")
        if group == "hypergradient" and method:
            errors.setdefault(problem, {})[method] = _curve(series, name)
    if not errors:
        return []
    return [_error_figure(shown, errors), *(_error_table(shown, p, e) for p, e in errors.items())]


def _error_figure(shown: Shown, errors: Errors) -> Figure:
    caption = (
        "Relative error of the hypergradient against the exact one, over the inner steps K;"
        f" geometric mean over {shown.run.settings.get('problems')} problems. Solid: implicit, with"
        " the number of conjugate gradient steps; dashed: unrolled."
    )
    records = [
        {"problem": problem, "method": method, "K": k, "relative_error": error}
        for problem, methods in errors.items()
        for method, by_steps in methods.items()
        for k, error in by_steps.items()
    ]
    return shown.figure("hypergradient", caption, partial(draw_errors, errors), records)


def _error_table(shown: Shown, problem: str, found: Mapping[str, Curve]) -> Table:
    caption = "Relative error of the hypergradient against inner steps K, "
    rows = [({"method": method}, by_steps) for method, by_steps in found.items()]
    return shown.curves(file_name("hypergradient", problem),
                        f"{caption}{problem.replace('_', ' ')}.", rows, "K = ")  # fmt: skip


# Convergence

CLAIMED = {"average_against_T": -1, "evaluations_all_tasks": 1, "floor": -1, "evaluations": 1}
SMALLEST = 0.001
"""Of the half widths that are shown."""


def convergence(request: Request) -> list[Section]:
    """The figure, and tables of slopes, floors, and norms around the bounds."""
    what = "Yang et al., Theorems 1 and 2, Corollary 1, appendix B.2"
    return by_run(request, "convergence", "Convergence", what, _convergence_items)


def _convergence_items(shown: Shown, series: AllSeries) -> Items:
    found = _findings(series, shown.run)
    if not found.averages:
        return []
    return [_convergence_figure(shown, found), _slopes(shown), _floors(shown, found),
            *(_around(shown, what, found) for what in BOUNDS)]  # fmt: skip


def _findings(series: AllSeries, run: Run) -> Findings:
    problems = _numbers(series, r"all_tasks/(\d+)/average")
    bounds = {what: run.result_number(name) for what, name in BOUNDS.items()}
    return Findings(
        [_curve(series, f"convergence/all_tasks/{n}/average") for n in problems],
        [_curve(series, f"convergence/all_tasks/{n}/last") for n in problems],
        _slope(run, "average_against_T"),
        {k: Floors(_floor(series, k), _slope(run, f"floor_K{k}"))
         for k in _numbers(series, r"floor/(\d+)")},
        {what: {start: _curve(series, f"convergence/{what}/{start}") for start in ("warm", "cold")}
         for what in BOUNDS},
        {what: int(bound) if math.isfinite(bound) else 0 for what, bound in bounds.items()},
    )  # fmt: skip


def _numbers(series: AllSeries, pattern: str) -> list[int]:
    """Those in the names of the metrics that have points."""
    names = [name for name, points in series.items() if points.steps]
    found = (re.fullmatch(f"convergence/{pattern}", name, re.ASCII) for name in names)
    return sorted({int(match[1][:9]) for match in found if match})


def _floor(series: AllSeries, k: int) -> dict[int, Mean]:
    halves = _curve(series, f"convergence/floor/{k}/half_width")
    return {batch: Mean(mean, halves.get(batch, math.nan), 0)
            for batch, mean in _curve(series, f"convergence/floor/{k}").items()}  # fmt: skip


def _slope(run: Run, name: str) -> Mean:
    mean = run.result_number(f"slope_{name}")
    return Mean(mean, run.result_number(f"slope_{name}_half_width"), 0)


def _convergence_figure(shown: Shown, found: Findings) -> Figure:
    records = [
        {"part": f"{what}/{n}", "at": t, "squared_norm": value}
        for what, curves in (("average", found.averages), ("last", found.lasts))
        for n, curve in enumerate(curves) for t, value in curve.items()
    ]  # fmt: skip
    records += [
        {"part": f"floor/{k}", "at": batch, "squared_norm": mean.mean}
        for k, floors in found.floors.items() for batch, mean in floors.by_batch.items()
    ]  # fmt: skip
    caption = (
        "Squared norm of the exact hypergradient: its average over T iterations with all tasks"
        " (Theorem 2), its floor against the tasks in a batch with 95 % intervals over"
        f" {shown.run.settings.get('problems')} problems (Theorem 1), and its last value with fewer"
        " and more steps than K_0 and N_0."
    )
    return shown.figure("convergence", caption, partial(draw_convergence, found), records)


def _slopes(shown: Shown) -> Table:
    """Every slope that the run returned, with what the paper claims."""
    names = [key.removeprefix("slope_") for key in shown.run.result
             if key.startswith("slope_") and not key.endswith("_half_width")]  # fmt: skip
    columns = (*texts("what"), Column("claimed", lambda r: str(r["claimed"])),
               Column("slope", _shown_slope))  # fmt: skip
    return shown.table(
        "convergence_slopes", "Slopes on logarithmic scales, and what the paper claims.", columns,
        [_slope_record(name, shown.run) for name in names],
        "±: 95 % over the problems (Student's t).",
    )  # fmt: skip


def _shown_slope(record: Record) -> str:
    if record["half_width"] < SMALLEST:
        return f"{number(record['slope'], digits=3)} ± less than {SMALLEST}"
    return plus_minus(record["slope"], record["half_width"], digits=3)


def _slope_record(name: str, run: Run) -> Record:
    kind, _, k = name.partition("_K")
    slope = _slope(run, name)
    what = {
        "average_against_T": "Theorem 2: average against T",
        "evaluations_all_tasks": "Corollary 1: evaluations against 1/epsilon, all tasks",
        "floor": f"Theorem 1: floor against |B|, K = {k}",
        "evaluations": f"Corollary 1 with batches: best |B| for each epsilon, K = {k}",
    }.get(kind, name)
    return {"what": what, "claimed": CLAIMED.get(kind, ""), "slope": slope.mean,
            "half_width": slope.half_width}  # fmt: skip


def _floors(shown: Shown, found: Findings) -> Table:
    rows = [
        ({"K": k, **{f"B_{batch}_half_width": mean.half_width
                     for batch, mean in floors.by_batch.items()}},
         {batch: mean.mean for batch, mean in floors.by_batch.items()})
        for k, floors in found.floors.items()
    ]  # fmt: skip
    caption = "Theorem 1: floor of the squared norm, mean over problems, by the tasks in a batch."
    return shown.curves("convergence_floors", caption, rows, "|B| = ", "B_")


def _around(shown: Shown, what: str, found: Findings) -> Table:
    caption = f"Last squared norm against {STEPS[what]}; {BOUNDS[what]} = {found.bounds[what]}."
    rows = [({"start": start}, curve) for start, curve in found.undercut[what].items()]
    return shown.curves(f"convergence_{what}", caption, rows, "", "at_")
