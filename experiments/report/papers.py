"""The papers' experiments, of which one run holds a whole figure: nothing is averaged over runs.

Memory (Yang et al. 2025, Fig. 2; Rajeswaran et al. 2019, Fig. 2b), error of the hypergradient
(Rajeswaran et al., Fig. 2a), convergence (Yang et al., Theorems 1 and 2, Corollary 1, appendix
B.2): from the metrics and results that `experiments.papers` records. A run itself ends with the
same tables and pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.report import content
from experiments.report.content import MIB, Column, Figure, Items, Record, Section, Source, Table
from experiments.report.figures import draw_panels
from experiments.report.summary import Request, difference_lines, run_list
from experiments.sweeps.runs import Run, command_of

Metrics: TypeAlias = Mapping[str, pd.Series]
"""By name, as recorded: values by a number of steps, or by another count."""

MOST = 4
"""Runs drawn of one experiment, each of other settings."""

MOST_STEPS = 100
"""Columns of a table."""


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
    order = sorted(groups.values(), reverse=True,
                   key=lambda g: (g[-1].command == default, runs.index(g[-1])))  # fmt: skip
    made: list[Table | Figure] = []
    for n, group in enumerate(order[:MOST]):
        run, notes = group[-1], _notes(group, n > 0)
        request.archive.load([run])
        metrics = {name: pd.Series(dict(zip(*series, strict=True))).sort_index()
                   for name, series in run.metrics.items() if series.steps}  # fmt: skip
        source, suffix = Source(run.command, [run.id]), f"_{n}" if n else ""
        made += [replace(item, name=item.name + suffix, source=source, notes=[*notes, *item.notes])
                 for item in items(run, metrics)]  # fmt: skip
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
        content.texts(*record), [record], Source(record["command"], [run.id for run in runs]),
    )  # fmt: skip


def named(metrics: Metrics, pattern: str) -> dict[str, pd.Series]:
    """Those whose whole name fits the pattern, by what is in its parentheses."""
    found = {name: re.fullmatch(pattern, name) for name in metrics}
    return {match[1]: metrics[name] for name, match in found.items() if match}


def _curves(
    name: str, caption: str, rows: Sequence[tuple[Record, pd.Series]], header: str,
    key: str = "K_", show: Callable[[Any], str] = content.significant, also: Sequence[int] = (),
    last: Sequence[Column] = (), notes: Sequence[str] = (),
) -> Table:  # fmt: skip
    """A row a curve, a column a step (and ``also``); ``header`` and ``key`` name a step's."""
    steps = sorted({*also, *(step for _, curve in rows for step in curve.index)})
    if len(steps) > MOST_STEPS:
        notes = [*notes, f"The first {MOST_STEPS} of {len(steps)} are shown."]
        del steps[MOST_STEPS:]
    heads = [key for key in ("method", "variant", "start", "K") if rows and key in rows[0][0]]
    between = [Column(f"{header}{n}", lambda record, n=n: show(record[f"{key}{n}"]))
               for n in steps]  # fmt: skip
    records = [{**{f"{key}{n}": curve.get(n, math.nan) for n in steps}, **row}
               for row, curve in rows]  # fmt: skip
    return Table(name, caption, [*content.texts(*heads), *between, *last], records, notes=notes)


# Memory and time against inner steps

OURS, CLAIM_AT = "rm_metal/cached", 5
SHOWN = {"rm_metal": "ImplicitCGHead", "imaml": "ImplicitMAML"}
"""Methods whose metrics have the papers' names."""
PAPERS = {"": ("yang", "Yang et al., Fig. 2"),
          "imaml_": ("rajeswaran", "Rajeswaran et al., Fig. 2b")}  # fmt: skip


def _memory(run: Run, metrics: Metrics) -> Items:
    for prefix, (paper, title) in PAPERS.items():
        if not (peaks := named(metrics, f"{prefix}memory/(.+/.+)")):
            continue
        of, measured = run.settings.get, named(metrics, f"{prefix}seconds/(.+/.+)")
        times = {name: measured.get(name, pd.Series()).reindex(curve.index)
                 for name, curve in peaks.items()}  # fmt: skip
        task = (
            f"{of(prefix + 'ways')}-way {of(prefix + 'shots')}-shot,"
            f" {of(prefix + 'queries')} queries a class,"
            f" {of(prefix + 'pixels')} x {of(prefix + 'pixels')} pixels,"
            f" CNN4-{of('hidden')}, {of('device')}"
        )
        yield Figure(
            f"memory_{paper}",
            f"{title}: peak of live tensors (left) and median time (right) of one task's outer step"
            f" against the inner steps K. {task}, random images.",
            partial(draw_memory, metrics, prefix),
            [{"method": name, "K": k, "peak_bytes": peak, "seconds": times[name][k]}
             for name, curve in peaks.items() for k, peak in curve.items()],
        )  # fmt: skip
        asked = run.counts(f"{prefix}inner_steps")
        left = {name: [str(k) for k in asked if k not in curve] for name, curve in peaks.items()}
        told = "; ".join(f"{name} at K = {', '.join(k)}" for name, k in left.items() if k)
        limit = f"limit_gib={of('limit_gib')}; a larger one fills them."
        notes = [f"Missing: {told}: the forecast was above {limit}"] if told else []
        labels = {name: _method(name) for name in peaks}
        ours = peaks.get(OURS, pd.Series()).get(CLAIM_AT, math.nan)
        # the share of a method's memory that ImplicitCGHead does without
        saved = {name: 1 - ours / (curve.get(CLAIM_AT) or math.nan)
                 for name, curve in peaks.items() if not name.startswith("rm_metal/")}  # fmt: skip
        rows = [({**labels[name], "saved": saved.get(name, math.nan)}, curve)
                for name, curve in peaks.items()]  # fmt: skip
        last, claim = [], []
        if math.isfinite(ours):
            header = f"ImplicitCGHead below it at K = {CLAIM_AT}, %"
            last = [content.number(header, "saved", 100, 0)]
            claim = ["ImplicitCGHead below it: with cached features, the package's default."]
        about = f"against inner steps K. {title}; {task}."
        yield _curves(
            f"memory_{paper}_peak", f"Peak of live tensors, MiB, {about}", rows, "K = ", "K_",
            lambda value: content.rounded(value, 1 / MIB), asked, last, notes + claim,
        )  # fmt: skip
        yield _curves(
            f"memory_{paper}_seconds", f"Seconds of one task's outer step, {about}",
            [(labels[name], curve) for name, curve in times.items()], "K = ", also=asked,
            notes=notes,
        )  # fmt: skip


def _method(name: str) -> dict[str, Any]:
    method, _, variant = name.partition("/")
    return {"method": SHOWN.get(method, method), "variant": variant.replace("_", " ")}


def draw_memory(metrics: Metrics, prefix: str) -> Drawing:
    """Memory and time of one task's outer step; ``prefix`` is that of the paper's metrics.

    Solid: cached features, or iMAML; dashed: as published.
    """
    shown = {"memory": (MIB, "peak of live tensors, MiB"), "seconds": (1, "seconds an outer step")}
    panels = {title: {"/".join(_method(name).values()): curve / scale for name, curve
                      in named(metrics, f"{prefix}{what}/(.+/.+)").items()}
              for what, (scale, title) in shown.items()}  # fmt: skip
    drawing = draw_panels(panels, lambda name: name.endswith("/as published"),
                          xlabel="inner steps K", ylabel="one task")  # fmt: skip
    for axis in (axis for axes in drawing.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    for floor in named(metrics, f"{prefix}memory/(supervised)").values():
        drawing.axes[0].axhline(floor.iloc[-1] / MIB, color="0.6", linewidth=1,
                                label="supervised step")  # fmt: skip
        drawing.axes[0].legend(fontsize="small")
    return drawing


# Error of the hypergradient


def _errors(run: Run, metrics: Metrics) -> Items:
    errors: dict[str, dict[str, pd.Series]] = {}
    for name, curve in named(metrics, "hypergradient/([^/]+/.+)").items():
        problem, _, method = name.partition("/")
        errors.setdefault(problem, {})[method] = curve
    if not errors:
        return
    panels = {problem.replace("_", " "): {_curve_name(name): curve
                                          for name, curve in methods.items()}
              for problem, methods in errors.items()}  # fmt: skip
    yield Figure(
        "hypergradient",
        "Relative error of the hypergradient against the exact one, over the inner steps K;"
        f" geometric mean over {run.settings.get('problems')} problems. Solid: implicit, with"
        " the number of conjugate gradient steps; dashed: unrolled.",
        partial(draw_panels, panels, lambda name: "CG steps" not in name, xlabel="inner steps K",
                ylabel="relative error of the hypergradient"),
        [{"problem": problem, "method": method, "K": k, "relative_error": error}
         for problem, methods in errors.items() for method, curve in methods.items()
         for k, error in curve.items()],
    )  # fmt: skip
    for problem, methods in errors.items():
        yield _curves(
            content.file_name("hypergradient", problem),
            "Relative error of the hypergradient against inner steps K,"
            f" {problem.replace('_', ' ')}.",
            [({"method": method}, curve) for method, curve in methods.items()], "K = ",
        )  # fmt: skip


def _curve_name(name: str) -> str:
    """``ImplicitMAML, CG steps: 5`` of ``imaml_cg5``."""
    method, _, steps = name.removesuffix("_unregularised").partition("_cg")
    told = f", CG steps: {steps}" if steps else ", unregularised" * name.endswith("_unregularised")
    return SHOWN.get(method, method) + told


# Convergence

STEPS = {"inner_steps": "inner steps K", "cg_steps": "conjugate gradient steps N"}
BOUNDS = {"inner_steps": "K_0", "cg_steps": "N_0"}
LEAST = 1e-32  # below rounding: a norm that is zero has a logarithm too
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
    averages = named(metrics, r"convergence/all_tasks/(\d+)/average")
    floors = named(metrics, r"convergence/floor/(\d+)")
    halves = named(metrics, r"convergence/floor/(\d+)/half_width")
    if not averages:
        return
    parts = {"average": averages, "last": named(metrics, r"convergence/all_tasks/(\d+)/last"),
             "floor": floors}  # fmt: skip
    result = {name: run.number(f"result.{name}") for name in run.result
              if name.startswith("slope_") or name in BOUNDS.values()}  # fmt: skip
    yield Figure(
        "convergence",
        "Squared norm of the exact hypergradient: its average over T iterations with all tasks"
        " (Theorem 2), its floor against the tasks in a batch with 95 % intervals over"
        f" {run.settings.get('problems')} problems (Theorem 1), and its last value with fewer"
        " and more steps than K_0 and N_0.",
        partial(draw_convergence, metrics, result),
        [{"part": f"{part}/{n}", "at": at, "squared_norm": value}
         for part, curves in parts.items() for n, curve in curves.items()
         for at, value in curve.items()],
    )  # fmt: skip
    yield Table(
        "convergence_slopes", "Slopes on logarithmic scales, and what the paper claims.",
        [*content.texts("what"), Column("claimed", lambda r: str(r["claimed"])),
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
            f" {content.rounded(result.get(bound), digits=0)}.",
            [({"start": start}, curve) for start, curve in starts.items()], "", "at_",
        )  # fmt: skip


def _slope(name: str, result: Mapping[str, float]) -> Record:
    kind, _, k = name.partition("_K")
    claimed, what = CLAIMED.get(kind, ("", ""))
    return {
        "what": what + k if what else name, "claimed": claimed, "slope": result[f"slope_{name}"],
        "half_width": result.get(f"slope_{name}_half_width", math.nan),
    }  # fmt: skip


def _shown_slope(record: Record) -> str:
    if record["half_width"] < SMALLEST:
        return f"{content.rounded(record['slope'], digits=3)} ± less than {SMALLEST}"
    return content.plus_minus(record["slope"], record["half_width"], digits=3)


def draw_convergence(metrics: Metrics, result: Mapping[str, float]) -> Drawing:
    """The four parts of the experiment; all values are squared hypergradient norms."""
    drawing = Drawing(figsize=(11, 8.5), layout="constrained")
    axes = drawing.subplots(2, 2)
    _theorem_2(axes[0, 0], metrics, result)
    _theorem_1(axes[0, 1], metrics, result)
    for cell, (what, bound) in zip(axes[1], BOUNDS.items(), strict=True):
        for start, curve in named(metrics, f"convergence/{what}/(warm|cold)").items():
            cell.loglog(curve.clip(lower=LEAST), "o-", label=f"{start} start")
        at = result.get(bound, math.nan)
        cell.axvline(at, color="0.5", linestyle="--", label=f"${bound}$ = {at:.0f}")
        cell.set(xlabel=STEPS[what], ylabel=r"last $\|\nabla F\|^2$", title="Appendix B.2")
    for cell in axes.flat:
        cell.grid(alpha=0.3)
        cell.legend()
    return drawing


def _theorem_2(axes: Axes, metrics: Metrics, result: Mapping[str, float]) -> None:
    averages = named(metrics, r"convergence/all_tasks/(\d+)/average")
    lasts = named(metrics, r"convergence/all_tasks/(\d+)/last")
    for number, (problem, curve) in enumerate(averages.items()):
        axes.loglog(curve, color=f"C{number}", label=f"problem {problem}, average")
        if problem in lasts:
            axes.loglog(lasts[problem][lasts[problem] > 1e-20], ":", color=f"C{number}", alpha=0.7)
    _slope_of_minus_one(axes, next(iter(averages.values())), -1)
    axes.set_ylim(bottom=1e-12)
    axes.set(xlabel="outer iterations T", ylabel=r"$\|\nabla F\|^2$: average (dotted: last)",
             title=f"Theorem 2: slope {_drawn_slope(result, 'average_against_T')}")  # fmt: skip


def _theorem_1(axes: Axes, metrics: Metrics, result: Mapping[str, float]) -> None:
    for k, floor in (floors := named(metrics, r"convergence/floor/(\d+)")).items():
        half = metrics.get(f"convergence/floor/{k}/half_width", floor * math.nan)
        # an interval that reaches below zero has no lower end on this scale
        widths = [np.minimum(half, 0.9 * floor), half]
        axes.errorbar(floor.index, floor, widths, fmt="o-", capsize=3,
                      label=f"K = {k}: slope {_drawn_slope(result, f'floor_K{k}')}")  # fmt: skip
    for floor in list(floors.values())[-1:]:
        _slope_of_minus_one(axes, floor, 0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tasks in a batch |B|", ylabel=r"floor of $\|\nabla F\|^2$",
             title="Theorem 1: the floor")  # fmt: skip


def _slope_of_minus_one(axes: Axes, curve: pd.Series, through: int) -> None:
    """A dashed line through one of the curve's points."""
    x = curve.index.to_numpy()
    line = curve.iloc[through] * x[through] / x
    axes.plot(x, line, "k--", linewidth=0.8, label="slope -1")


def _drawn_slope(result: Mapping[str, float], name: str) -> str:
    value, half = (result.get(f"slope_{name}{end}") for end in ("", "_half_width"))
    return content.plus_minus(value, half, digits=3)


PARTS: dict[str, tuple[str, str, Callable[[Run, Metrics], Items]]] = {
    "memory": ("Memory against inner steps", "Yang et al., Fig. 2; Rajeswaran et al., Fig. 2b",
               _memory),
    "hypergradient": ("Error of the hypergradient", "Rajeswaran et al., Fig. 2a, and the same for"
                      " Algorithm 1 of Yang et al.", _errors),
    "convergence": ("Convergence", "Yang et al., Theorems 1 and 2, Corollary 1, appendix B.2",
                    _convergence),
}  # fmt: skip
"""By experiment: a title, what of the papers it is, and what makes the items of a run."""
