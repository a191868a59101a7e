"""The papers' experiments, of which one run holds a whole figure: nothing is averaged over runs.

Memory (Yang et al. 2025, Fig. 2; Rajeswaran et al. 2019, Fig. 2b), error of the hypergradient
(Rajeswaran et al., Fig. 2a), convergence (Yang et al., Theorems 1 and 2, Corollary 1, appendix
B.2): from the metrics and results that `experiments.papers` records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from experiments.report import columns, paper_figures
from experiments.report.columns import Column, Record
from experiments.report.content import Figure, Items, Section, Source, Table, file_name
from experiments.report.paper_figures import BOUNDS, STEPS, Metrics, by_problem, named
from experiments.report.runs import Run, command_of, difference_lines, run_list
from experiments.report.summary import Request

MOST = 4
"""Runs drawn of one experiment, each of other settings."""


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
        run, notes = group[-1], _notes(group, n > 0)
        request.archive.load([run])
        metrics = {name: pd.Series(dict(zip(*series, strict=True))).sort_index()
                   for name, series in run.metrics.items() if series.steps}  # fmt: skip
        source, suffix = Source(run.command, [run.id]), f"_{n}" if n else ""
        for item in items(run, metrics):
            notes_of, name = [*notes, *item.notes], f"{item.name}{suffix}"
            made.append(replace(item, name=name, source=source, notes=notes_of))
    left = run_list(run.id for group in order[MOST:] for run in group)
    text = [f"Not drawn: runs {left}, of still other settings."] if left else []
    return Section(title, text, made or [_missing(experiment, what, runs)])


def _notes(group: Sequence[Run], other: bool) -> list[str]:
    """What the newest run of a group was run with, and which runs it stands for."""
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


def _curves(
    name: str, caption: str, rows: Sequence[tuple[Record, pd.Series]], header: str,
    key: str = "K_", show: Callable[[Any], str] = columns.significant, also: Sequence[int] = (),
    last: Sequence[Column] = (), notes: Sequence[str] = (),
) -> Table:  # fmt: skip
    """A row a curve, a column a step (and ``also``); ``header`` and ``key`` name a step's."""
    steps = sorted({*also, *(step for _, curve in rows for step in curve.index)})
    heads = [key for key in ("method", "variant", "start", "K") if rows and key in rows[0][0]]
    between = [Column(f"{header}{n}", lambda record, n=n: show(record[f"{key}{n}"]))
               for n in steps]  # fmt: skip
    records = [{**{f"{key}{n}": curve.get(n, math.nan) for n in steps}, **row}
               for row, curve in rows]  # fmt: skip
    return Table(name, caption, [*columns.texts(*heads), *between, *last], records, notes=notes)


# Memory and time against inner steps

OURS, CLAIM_AT = "rm_metal/cached", 5
SHOWN = {"rm_metal": "ImplicitCGHead", "imaml": "ImplicitMAML"}
"""Methods whose metrics have the papers' names."""
PAPERS = {"": ("yang", "Yang et al., Fig. 2"),
          "imaml_": ("rajeswaran", "Rajeswaran et al., Fig. 2b")}  # fmt: skip


def _memory(run: Run, metrics: Metrics) -> Items:
    for prefix, (paper, title) in PAPERS.items():
        peaks = named(metrics, f"{prefix}memory/(.+/.+)")
        times = named(metrics, f"{prefix}seconds/(.+/.+)")
        if not peaks:
            continue
        ways, shots, queries, pixels = (
            run.settings.get(prefix + name) for name in ("ways", "shots", "queries", "pixels")
        )
        task = (
            f"{ways}-way {shots}-shot, {queries} queries a class, {pixels} x {pixels} pixels,"
            f" CNN4-{run.settings.get('hidden')}, {run.settings.get('device')}"
        )
        times = {name: times.get(name, pd.Series()).reindex(curve.index)
                 for name, curve in peaks.items()}  # fmt: skip
        yield Figure(
            f"memory_{paper}",
            f"{title}: peak of live tensors (left) and median time (right) of one task's outer step"
            f" against the inner steps K. {task}, random images.",
            partial(paper_figures.draw_memory, metrics, prefix),
            [{"method": name, "K": k, "peak_bytes": peak, "seconds": times[name][k]}
             for name, curve in peaks.items() for k, peak in curve.items()],
        )  # fmt: skip
        asked = run.counts(f"{prefix}inner_steps")
        left = {name: [str(k) for k in asked if k not in curve] for name, curve in peaks.items()}
        told = "; ".join(f"{name} at K = {', '.join(k)}" for name, k in left.items() if k)
        limit = f"limit_gib={run.settings.get('limit_gib')}; a larger one fills them."
        notes = [f"Missing: {told}: the forecast was above {limit}"] if told else []
        rows = [(_saved(name, curve, peaks), curve) for name, curve in peaks.items()]
        last, claim = [], []
        if OURS in peaks and CLAIM_AT in peaks[OURS]:
            saved = f"ImplicitCGHead below it at K = {CLAIM_AT}, %"
            last = [columns.number(saved, "saved", 100, 0)]
            claim = ["ImplicitCGHead below it: with cached features, the package's default."]
        about = f"against inner steps K. {title}; {task}."
        yield _curves(
            f"memory_{paper}_peak", f"Peak of live tensors, MiB, {about}", rows, "K = ", "K_",
            lambda value: columns.rounded(value, 1 / columns.MIB), asked, last, notes + claim,
        )  # fmt: skip
        yield _curves(
            f"memory_{paper}_seconds", f"Seconds of one task's outer step, {about}",
            [(_method(name), curve) for name, curve in times.items()], "K = ", also=asked,
            notes=notes,
        )  # fmt: skip


def _method(name: str) -> dict[str, Any]:
    method, _, variant = name.partition("/")
    return {"method": SHOWN.get(method, method), "variant": variant.replace("_", " ")}


def _saved(name: str, theirs: pd.Series, peaks: Metrics) -> dict[str, Any]:
    """The share of a method's memory that ImplicitCGHead does without."""
    row, ours = _method(name), peaks.get(OURS, pd.Series())
    both = row["method"] != SHOWN["rm_metal"] and CLAIM_AT in ours and theirs.get(CLAIM_AT)
    return {**row, "saved": 1 - ours[CLAIM_AT] / theirs[CLAIM_AT] if both else math.nan}


# Error of the hypergradient


def _errors(run: Run, metrics: Metrics) -> Items:
    if not (errors := by_problem(metrics)):
        return
    yield Figure(
        "hypergradient",
        "Relative error of the hypergradient against the exact one, over the inner steps K;"
        f" geometric mean over {run.settings.get('problems')} problems. Solid: implicit, with"
        " the number of conjugate gradient steps; dashed: unrolled.",
        partial(paper_figures.draw_errors, metrics),
        [{"problem": problem, "method": method, "K": k, "relative_error": error}
         for problem, methods in errors.items() for method, curve in methods.items()
         for k, error in curve.items()],
    )  # fmt: skip
    for problem, methods in errors.items():
        yield _curves(
            file_name("hypergradient", problem),
            "Relative error of the hypergradient against inner steps K,"
            f" {problem.replace('_', ' ')}.",
            [({"method": method}, curve) for method, curve in methods.items()], "K = ",
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


def _convergence(run: Run, metrics: Metrics) -> Items:
    averages, lasts = (named(metrics, rf"convergence/all_tasks/(\d+)/{what}")
                       for what in ("average", "last"))  # fmt: skip
    floors = named(metrics, r"convergence/floor/(\d+)")
    halves = named(metrics, r"convergence/floor/(\d+)/half_width")
    parts = {f"{what}/{n}": curve
             for what, curves in (("average", averages), ("last", lasts), ("floor", floors))
             for n, curve in curves.items()}  # fmt: skip
    if not averages:
        return
    result = {name: run.number(f"result.{name}") for name in run.result
              if name.startswith("slope_") or name in BOUNDS.values()}  # fmt: skip
    yield Figure(
        "convergence",
        "Squared norm of the exact hypergradient: its average over T iterations with all tasks"
        " (Theorem 2), its floor against the tasks in a batch with 95 % intervals over"
        f" {run.settings.get('problems')} problems (Theorem 1), and its last value with fewer"
        " and more steps than K_0 and N_0.",
        partial(paper_figures.draw_convergence, metrics, result),
        [{"part": part, "at": at, "squared_norm": value}
         for part, curve in parts.items() for at, value in curve.items()],
    )  # fmt: skip
    yield Table(
        "convergence_slopes", "Slopes on logarithmic scales, and what the paper claims.",
        [*columns.texts("what"), Column("claimed", lambda r: str(r["claimed"])),
         Column("slope", _shown_slope)],
        [_slope(name[6:], result) for name in result
         if name.startswith("slope_") and not name.endswith("_half_width")],
        notes=["±: 95 % over the problems (Student's t)."],
    )  # fmt: skip
    yield _curves(
        "convergence_floors",
        "Theorem 1: floor of the squared norm, mean over problems, by the tasks in a batch.",
        [({"K": k, **{f"B_{b}_half_width": halves.get(k, pd.Series()).get(b, math.nan)
                      for b in floor.index}}, floor) for k, floor in floors.items()],
        "|B| = ", "B_",
    )  # fmt: skip
    for what, bound in BOUNDS.items():
        starts = named(metrics, f"convergence/{what}/(warm|cold)")
        yield _curves(
            f"convergence_{what}",
            f"Last squared norm against {STEPS[what]}; {bound} ="
            f" {columns.rounded(result.get(bound), digits=0)}.",
            [({"start": start}, curve) for start, curve in starts.items()], "", "at_",
        )  # fmt: skip


def _slope(name: str, result: dict[str, float]) -> Record:
    kind, _, k = name.partition("_K")
    claimed, what = CLAIMED.get(kind, ("", ""))
    return {
        "what": what + k if what else name, "claimed": claimed, "slope": result[f"slope_{name}"],
        "half_width": result.get(f"slope_{name}_half_width", math.nan),
    }  # fmt: skip


def _shown_slope(record: Record) -> str:
    if record["half_width"] < SMALLEST:
        return f"{columns.rounded(record['slope'], digits=3)} ± less than {SMALLEST}"
    return columns.plus_minus(record["slope"], record["half_width"], digits=3)


PARTS: dict[str, tuple[str, str, Callable[[Run, Metrics], Items]]] = {
    "memory": ("Memory against inner steps", "Yang et al., Fig. 2; Rajeswaran et al., Fig. 2b",
               _memory),
    "hypergradient": ("Error of the hypergradient", "Rajeswaran et al., Fig. 2a, and the same for"
                      " Algorithm 1 of Yang et al.", _errors),
    "convergence": ("Convergence", "Yang et al., Theorems 1 and 2, Corollary 1, appendix B.2",
                    _convergence),
}  # fmt: skip
"""By experiment: a title, what of the papers it is, and what makes the items of a run."""
