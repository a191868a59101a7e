"""Slopes, floors and bounds (Yang et al. 2025, Theorems 1 and 2, Corollary 1, appendix B.2).

Reads the metrics and the result that `experiments.papers.convergence` records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.papers.convergence.figure import BOUNDS, LABELS, Curve, Findings, Floors, drawing
from experiments.report.archive import NO_SERIES, Archive, Series
from experiments.report.content import (
    Column,
    Figure,
    Record,
    Section,
    Table,
    number,
    plus_minus,
    significant,
    text_column,
)
from experiments.report.request import Request
from experiments.report.sections.by_run import Shown, by_run
from experiments.statistics import Mean

TITLE = "Convergence"
WHAT = "Yang et al., Theorems 1 and 2, Corollary 1, appendix B.2"
GROUP = "convergence"
CLAIMED = {"average_against_T": -1, "evaluations_all_tasks": 1, "floor": -1, "evaluations": 1}

SMALLEST = 0.001
"""Of the half widths that are shown."""

AllSeries = Mapping[str, Series]


def sections(request: Request) -> list[Section]:
    """The figure, and tables of slopes, floors, and norms around the bounds."""
    return by_run(request, GROUP, TITLE, WHAT, _items)


def _items(shown: Shown, archive: Archive) -> list[Table | Figure]:
    found = _findings(archive.all_series(shown.run), shown.run.result)
    if not found.averages:
        return []
    return [_figure(shown, found), _slopes(shown), _floors(shown, found),
            *(_around(shown, what, found) for what in BOUNDS)]  # fmt: skip


def _findings(series: AllSeries, result: Mapping[str, Any]) -> Findings:
    problems = sum(name.endswith("/average") for name in series)
    return Findings(
        [_curve(series, f"all_tasks/{n}/average") for n in range(problems)],
        [_curve(series, f"all_tasks/{n}/last") for n in range(problems)],
        _slope(result, "average_against_T"),
        _by_inner_steps(series, result),
        {what: {start: _curve(series, f"{what}/{start}") for start in ("warm", "cold")}
         for what in BOUNDS},
        {what: int(result.get(name, 0)) for what, name in BOUNDS.items()},
    )  # fmt: skip


def _curve(series: AllSeries, name: str) -> Curve:
    return dict(sorted(zip(*series.get(f"{GROUP}/{name}", NO_SERIES), strict=False)))


def _by_inner_steps(series: AllSeries, result: Mapping[str, Any]) -> dict[int, Floors]:
    names = [name.split("/") for name in series]
    ks = sorted(int(name[2]) for name in names if name[:2] == [GROUP, "floor"] and len(name) == 3)
    return {k: Floors(_floor(series, k), _slope(result, f"floor_K{k}")) for k in ks}


def _floor(series: AllSeries, k: int) -> dict[int, Mean]:
    halves = _curve(series, f"floor/{k}/half_width")
    return {batch: Mean(mean, halves.get(batch, math.nan), 0)
            for batch, mean in _curve(series, f"floor/{k}").items()}  # fmt: skip


def _slope(result: Mapping[str, Any], name: str) -> Mean:
    mean, half = (result.get(f"slope_{name}{end}", math.nan) for end in ("", "_half_width"))
    return Mean(mean, half, 0)


def _figure(shown: Shown, found: Findings) -> Figure:
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
    name = f"{GROUP}{shown.suffix}"
    return Figure(name, caption, lambda: drawing(found), tuple(records), shown.source, shown.notes)


def _slopes(shown: Shown) -> Table:
    """Every slope that the run returned, with what the paper claims."""
    names = [key.removeprefix("slope_") for key in shown.run.result
             if key.startswith("slope_") and not key.endswith("_half_width")]  # fmt: skip
    records = tuple(_slope_record(name, shown.run.result) for name in names)
    columns = (
        text_column("what", "what"),
        Column("claimed", lambda r: str(r["claimed"])),
        Column("slope", lambda r: _shown_slope(r["slope"], r["half_width"])),
    )
    notes = (*shown.notes, "±: 95 % over the problems (Student's t).")
    caption = "Slopes on logarithmic scales, and what the paper claims."
    return Table(f"{GROUP}_slopes{shown.suffix}", caption, columns, records, shown.source, notes)


def _shown_slope(slope: float, half_width: float) -> str:
    if half_width < SMALLEST:
        return f"{number(slope, digits=3)} ± less than {SMALLEST}"
    return plus_minus(slope, half_width, digits=3)


def _slope_record(name: str, result: Mapping[str, Any]) -> Record:
    kind, _, k = name.partition("_K")
    slope = _slope(result, name)
    what = {
        "average_against_T": "Theorem 2: average against T",
        "evaluations_all_tasks": "Corollary 1: evaluations against 1/epsilon, all tasks",
        "floor": f"Theorem 1: floor against |B|, K = {k}",
        "evaluations": f"Corollary 1 with batches: best |B| for each epsilon, K = {k}",
    }.get(kind, name)
    return {"what": what, "claimed": CLAIMED.get(kind, ""), "slope": slope.mean,
            "half_width": slope.half_width}  # fmt: skip


def _floors(shown: Shown, found: Findings) -> Table:
    records = tuple(
        {"K": k, **{f"B_{batch}": mean.mean for batch, mean in floors.by_batch.items()},
         **{f"B_{batch}_half_width": mean.half_width for batch, mean in floors.by_batch.items()}}
        for k, floors in found.floors.items()
    )  # fmt: skip
    sizes = sorted({batch for floors in found.floors.values() for batch in floors.by_batch})
    columns = (text_column("K", "K"), *(_value(f"|B| = {b}", f"B_{b}") for b in sizes))
    caption = "Theorem 1: floor of the squared norm, mean over problems, by the tasks in a batch."
    return Table(
        f"{GROUP}_floors{shown.suffix}", caption, columns, records, shown.source, shown.notes
    )


def _around(shown: Shown, what: str, found: Findings) -> Table:
    curves = found.undercut[what]
    records = tuple({"start": start, **{f"at_{n}": value for n, value in curve.items()}}
                    for start, curve in curves.items())  # fmt: skip
    steps = sorted({n for curve in curves.values() for n in curve})
    columns = (text_column("start", "start"), *(_value(str(n), f"at_{n}") for n in steps))
    caption = f"Last squared norm against {LABELS[what]}; {BOUNDS[what]} = {found.bounds[what]}."
    name = f"{GROUP}_{what}{shown.suffix}"
    return Table(name, caption, columns, records, shown.source, shown.notes)


def _value(header: str, key: str) -> Column:
    return Column(header, lambda record: significant(record.get(key)))
