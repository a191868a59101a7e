"""The papers' experiments, of which one run holds a whole figure: nothing is averaged over runs.

Memory (Yang et al. 2025, Fig. 2; Rajeswaran et al. 2019, Fig. 2b), error of the hypergradient
(Rajeswaran et al., Fig. 2a), convergence (Yang et al., Theorems 1 and 2, Corollary 1, appendix
B.2): from the metrics and results that `experiments.papers` records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from experiments.report import columns
from experiments.report.columns import Column, Record
from experiments.report.content import Figure, Section, Source, Table, file_name
from experiments.report.paper_figures import (
    BOUNDS,
    STEPS,
    Curve,
    Findings,
    Floors,
    Growth,
    Point,
    draw_convergence,
    draw_errors,
    draw_memory,
)
from experiments.report.runs import NO_SERIES, Run, Series, command_of, difference_lines, run_list
from experiments.report.summary import Request
from experiments.statistics import Mean

MOST = 4
"""Runs drawn of one experiment, each of other settings."""

AllSeries = Mapping[str, Series]
Items = Iterator[Table | Figure]


class Shown(NamedTuple):
    """A run that is drawn."""

    run: Run
    suffix: str  # of its files' names, empty for the first
    notes: Sequence[str]  # what it was run with, and which runs it stands for

    def table(self, name: str, caption: str, heads: Sequence[Column],
              records: Sequence[Record], *notes: str) -> Table:  # fmt: skip
        """One of its tables."""
        return Table(f"{name}{self.suffix}", caption, heads, records,
                     Source(self.run.command, [self.run.id]), [*self.notes, *notes])  # fmt: skip

    def curves(self, name: str, caption: str, rows: Sequence[tuple[Record, Curve]], header: str,
               key: str = "K_", show: Callable[[Any], str] = columns.significant,
               last: Sequence[Column] = (), *notes: str) -> Table:  # fmt: skip
        """A table with a row a curve and a column a step; ``header`` and ``key`` name a step's."""
        steps = sorted({step for _, curve in rows for step in curve})
        heads = [key for key in ("method", "variant", "start", "K") if rows and key in rows[0][0]]
        between = [Column(f"{header}{n}", partial(_shown, show, f"{key}{n}")) for n in steps]
        records = [{**{f"{key}{n}": curve.get(n, math.nan) for n in steps}, **row}
                   for row, curve in rows]  # fmt: skip
        return self.table(name, caption, [*columns.texts(*heads), *between, *last], records, *notes)

    def figure(self, name: str, caption: str, draw: Callable[[], Drawing],
               records: Sequence[Record]) -> Figure:  # fmt: skip
        """One of its figures."""
        return Figure(f"{name}{self.suffix}", caption, draw, records,
                      Source(self.run.command, [self.run.id]), self.notes)  # fmt: skip


def sections(request: Request) -> list[Section]:
    """One for each experiment: tables and figures of each run shown, or the missing command."""
    return [_section(request, name) for name in PARTS]


def _section(request: Request, experiment: str) -> Section:
    """Of runs of equal settings and seed the newest; the one of default settings first."""
    title, what, items = PARTS[experiment]
    runs = request.archive.of_experiment(experiment)
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        if run.complete:
            groups.setdefault((run.settings_key, run.seed), []).append(run)
    default = command_of(experiment)
    order = sorted(groups.values(), key=lambda g: (g[-1].command == default, runs.index(g[-1])))
    order.reverse()
    made: list[Table | Figure] = []
    for n, group in enumerate(order[:MOST]):
        request.archive.load(group[-1:])
        shown = Shown(group[-1], f"_{n}" if n else "", _notes(group, n > 0))
        made += items(shown, request.archive.all_series(shown.run))
    left = run_list(run.id for group in order[MOST:] for run in group)
    text = [f"Not drawn: runs {left}, of still other settings."] if left else []
    return Section(title, text, made or [_missing(experiment, what, runs)])


def _notes(group: Sequence[Run], other: bool) -> list[str]:
    """Runs of one group, oldest first."""
    newest = group[-1]
    notes = [f"Other settings than above: {newest.command}"] if other else []
    if len(group) > 1:
        older = run_list(run.id for run in group[:-1])
        notes.append(
            f"Run {newest.id} is the newest of {len(group)} runs of equal settings and seed;"
            f" not drawn, and averaged with nothing: {older}."
        )
    return [*notes, *difference_lines("These runs", group)]


def _missing(experiment: str, what: str, runs: Sequence[Run]) -> Table:
    """What there is instead of a complete run."""
    record = {"what": what, "state": "not run", "why": "", "command": command_of(experiment)}
    for last in runs[-1:]:
        why = f"run {last.id} {last.status}: {last.failure or 'no metrics'}"
        record |= {"state": last.status.lower(), "why": why}
    return Table(
        f"missing_{experiment}", f"Missing: no complete run of experiments.papers.{experiment}.",
        columns.texts(*record), [record], Source(record["command"], [run.id for run in runs]),
    )  # fmt: skip


def _shown(show: Callable[[Any], str], key: str, record: Record) -> str:
    return show(record[key])


def _curve(series: AllSeries, name: str) -> dict[int, float]:
    return dict(sorted(zip(*series.get(name, NO_SERIES), strict=True)))


# Memory and time against inner steps

OURS, CLAIM_AT = "rm_metal/cached", 5
PAPERS = {"yang": ("Yang et al., Fig. 2", ""),
          "rajeswaran": ("Rajeswaran et al., Fig. 2b", "imaml_")}  # fmt: skip


def _memory_items(shown: Shown, series: AllSeries) -> Items:
    settings = shown.run.settings
    for paper, (title, prefix) in PAPERS.items():
        found = _growth(series, prefix, shown.run.counts(f"{prefix}inner_steps"))
        if not found:
            continue
        ways, shots, queries, pixels = (
            settings.get(prefix + name) for name in ("ways", "shots", "queries", "pixels")
        )
        task = (
            f"{ways}-way {shots}-shot, {queries} queries a class, {pixels} x {pixels} pixels,"
            f" CNN4-{settings.get('hidden')}, {settings.get('device')}"
        )
        records = [
            {"method": name, "K": k, "peak_bytes": point.peak, "seconds": point.seconds}
            for name, each in found.items() for k, point in each.points.items()
        ]  # fmt: skip
        floor = series.get(f"{prefix}memory/supervised", NO_SERIES).values
        yield shown.figure(
            f"memory_{paper}",
            f"{title}: peak of live tensors (left) and median time (right) of one task's outer step"
            f" against the inner steps K. {task}, random images.",
            partial(draw_memory, found, floor[-1] if floor else None), records,
        )  # fmt: skip
        for what in ("peak", "seconds"):
            yield _memory_table(shown, found, paper, f"{title}; {task}", what)


def _mebibytes(value: float) -> str:
    return columns.rounded(value, 1 / columns.MIB)


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


def _memory_table(
    shown: Shown, found: Mapping[str, Growth], paper: str, title: str, what: str
) -> Table:
    """A row a method, a column a K; what rm_metal saves at K = 5 beside the memory."""
    left = [f"{n} at K = {', '.join(map(str, g.left_out))}" for n, g in found.items() if g.left_out]
    last, notes = [], []
    if left:
        limit = shown.run.settings.get("limit_gib")
        notes.append(f"Missing: {'; '.join(left)}: the forecast was above limit_gib={limit};"
                     " a larger one fills them.")  # fmt: skip
    ours = found[OURS].points.get(CLAIM_AT) if OURS in found and what == "peak" else None
    if ours is not None:
        last = [columns.number(f"rm_metal below it at K = {CLAIM_AT}, %", "saved", 100, 0)]
        notes.append("rm_metal below it: rm_metal with cached features, the package's default.")
    rows = []
    for name, each in found.items():
        method, _, variant = name.partition("/")
        row: dict[str, Any] = {"method": method, "variant": variant.replace("_", " ")}
        if what == "peak":  # the share of this method's memory that rm_metal does without
            theirs = each.points.get(CLAIM_AT)
            row["saved"] = math.nan
            if ours and theirs and theirs.peak and method != "rm_metal":
                row["saved"] = 1 - ours.peak / theirs.peak
        values = {k: getattr(point, what) for k, point in each.points.items()}
        rows.append((row, {**values, **dict.fromkeys(each.left_out, math.nan)}))
    unit = "Peak of live tensors, MiB" if what == "peak" else "Seconds of one task's outer step"
    return shown.curves(
        f"memory_{paper}_{what}", f"{unit}, against inner steps K. {title}.", rows, "K = ", "K_",
        _mebibytes if what == "peak" else columns.significant, last, *notes,
    )  # fmt: skip


# Error of the hypergradient


def _error_items(shown: Shown, series: AllSeries) -> Items:
    errors: dict[str, dict[str, Curve]] = {}
    for name in series:
        group, _, rest = name.partition("/")
        problem, _, method = rest.partition("/")
        if group == "hypergradient" and method:
            errors.setdefault(problem, {})[method] = _curve(series, name)
    if not errors:
        return
    yield shown.figure(
        "hypergradient",
        "Relative error of the hypergradient against the exact one, over the inner steps K;"
        f" geometric mean over {shown.run.settings.get('problems')} problems. Solid: implicit, with"
        " the number of conjugate gradient steps; dashed: unrolled.",
        partial(draw_errors, errors),
        [{"problem": problem, "method": method, "K": k, "relative_error": error}
         for problem, methods in errors.items() for method, by_steps in methods.items()
         for k, error in by_steps.items()],
    )  # fmt: skip
    for problem, methods in errors.items():
        yield shown.curves(
            file_name("hypergradient", problem),
            "Relative error of the hypergradient against inner steps K,"
            f" {problem.replace('_', ' ')}.",
            [({"method": method}, by_steps) for method, by_steps in methods.items()], "K = ",
        )  # fmt: skip


# Convergence

CLAIMED = {
    "average_against_T": (-1, "Theorem 2: average against T"),
    "evaluations_all_tasks": (1, "Corollary 1: evaluations against 1/epsilon, all tasks"),
    "floor": (-1, "Theorem 1: floor against |B|, K = "),
    "evaluations": (1, "Corollary 1 with batches: best |B| for each epsilon, K = "),
}
"""The slopes that the paper claims, and what they are of, by the names of the results."""

SMALLEST = 0.001
"""Of the half widths that are shown."""


def _convergence_items(shown: Shown, series: AllSeries) -> Items:
    found = _findings(series, shown.run)
    if not found.averages:
        return
    yield _convergence_figure(shown, found)
    yield _slopes(shown)
    yield shown.curves(
        "convergence_floors",
        "Theorem 1: floor of the squared norm, mean over problems, by the tasks in a batch.",
        [({"K": k, **{f"B_{b}_half_width": mean.half_width for b, mean in each.by_batch.items()}},
          {b: mean.mean for b, mean in each.by_batch.items()})
         for k, each in found.floors.items()], "|B| = ", "B_",
    )  # fmt: skip
    for what, bound in found.bounds.items():
        yield shown.curves(
            f"convergence_{what}", f"Last squared norm against {STEPS[what]};"
            f" {BOUNDS[what]} = {bound}.",
            [({"start": start}, curve) for start, curve in found.undercut[what].items()],
            "", "at_",
        )  # fmt: skip


def _findings(series: AllSeries, run: Run) -> Findings:
    def curve(name: str) -> dict[int, float]:
        return _curve(series, f"convergence/{name}")

    def numbers(pattern: str) -> list[int]:
        """Those in the names of the metrics that have points."""
        names = [name for name, points in series.items() if points.steps]
        found = (re.fullmatch(f"convergence/{pattern}", name, re.ASCII) for name in names)
        return sorted({int(match[1][:9]) for match in found if match})

    def floors(k: int) -> Floors:
        halves = curve(f"floor/{k}/half_width")
        return Floors({batch: Mean(mean, halves.get(batch, math.nan), 0)
                       for batch, mean in curve(f"floor/{k}").items()},
                      _slope(run, f"floor_K{k}"))  # fmt: skip

    problems = numbers(r"all_tasks/(\d+)/average")
    bounds = {what: run.number(f"result.{name}") for what, name in BOUNDS.items()}
    return Findings(
        [curve(f"all_tasks/{n}/average") for n in problems],
        [curve(f"all_tasks/{n}/last") for n in problems],
        _slope(run, "average_against_T"),
        {k: floors(k) for k in numbers(r"floor/(\d+)")},
        {what: {start: curve(f"{what}/{start}") for start in ("warm", "cold")} for what in BOUNDS},
        {what: int(bound) if math.isfinite(bound) else 0 for what, bound in bounds.items()},
    )


def _slope(run: Run, name: str) -> Mean:
    slope = f"result.slope_{name}"
    return Mean(run.number(slope), run.number(f"{slope}_half_width"), 0)


def _convergence_figure(shown: Shown, found: Findings) -> Figure:
    parts = {f"{what}/{n}": curve
             for what, curves in (("average", found.averages), ("last", found.lasts))
             for n, curve in enumerate(curves)}  # fmt: skip
    parts |= {f"floor/{k}": {batch: mean.mean for batch, mean in floors.by_batch.items()}
              for k, floors in found.floors.items()}  # fmt: skip
    caption = (
        "Squared norm of the exact hypergradient: its average over T iterations with all tasks"
        " (Theorem 2), its floor against the tasks in a batch with 95 % intervals over"
        f" {shown.run.settings.get('problems')} problems (Theorem 1), and its last value with fewer"
        " and more steps than K_0 and N_0."
    )
    records = [{"part": part, "at": at, "squared_norm": value}
               for part, curve in parts.items() for at, value in curve.items()]  # fmt: skip
    return shown.figure("convergence", caption, partial(draw_convergence, found), records)


def _slopes(shown: Shown) -> Table:
    """Every slope that the run returned, with what the paper claims."""
    records = []
    for key in shown.run.result:
        name = key.removeprefix("slope_")
        if name == key or name.endswith("_half_width"):
            continue
        kind, _, k = name.partition("_K")
        claimed, what = CLAIMED.get(kind, ("", name))
        slope = _slope(shown.run, name)
        records.append({"what": what + k if kind in CLAIMED else what, "claimed": claimed,
                        "slope": slope.mean, "half_width": slope.half_width})  # fmt: skip
    heads = (*columns.texts("what"), Column("claimed", lambda r: str(r["claimed"])),
               Column("slope", _shown_slope))  # fmt: skip
    return shown.table(
        "convergence_slopes", "Slopes on logarithmic scales, and what the paper claims.", heads,
        records, "±: 95 % over the problems (Student's t).",
    )  # fmt: skip


def _shown_slope(record: Record) -> str:
    if record["half_width"] < SMALLEST:
        return f"{columns.rounded(record['slope'], digits=3)} ± less than {SMALLEST}"
    return columns.plus_minus(record["slope"], record["half_width"], digits=3)


PARTS: Mapping[str, tuple[str, str, Callable[[Shown, AllSeries], Items]]] = {
    "memory": ("Memory against inner steps", "Yang et al., Fig. 2; Rajeswaran et al., Fig. 2b",
               _memory_items),
    "hypergradient": ("Error of the hypergradient", "Rajeswaran et al., Fig. 2a, and the same for"
                      " Algorithm 1 of Yang et al.", _error_items),
    "convergence": ("Convergence", "Yang et al., Theorems 1 and 2, Corollary 1, appendix B.2",
                    _convergence_items),
}  # fmt: skip
"""By experiment: a title, what of the papers it is, and what makes the items of a run."""
