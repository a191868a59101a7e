"""Memory and time against inner steps (Yang et al. 2025, Fig. 2; Rajeswaran et al. 2019, Fig. 2b).

Reads the metrics that `experiments.papers.memory` records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Drawing

from experiments.papers.memory.figure import panel
from experiments.papers.memory.points import Growth, Point
from experiments.report.archive import Archive, Run, Series
from experiments.report.content import (
    Column,
    Figure,
    Record,
    Section,
    Table,
    number,
    significant,
    text_column,
)
from experiments.report.request import Request
from experiments.report.sections.by_run import Shown, by_run

MIB = 2.0**20
TITLE = "Memory against inner steps"
WHAT = "Yang et al., Fig. 2; Rajeswaran et al., Fig. 2b"
OURS = "rm_metal/cached"
CLAIM_AT = 5

Grown = dict[str, Growth]


def sections(request: Request) -> list[Section]:
    """The figures, and a table each of memory and of time."""
    return by_run(request, "memory", TITLE, WHAT, _items)


def _items(shown: Shown, archive: Archive) -> list[Table | Figure]:
    series = archive.all_series(shown.run)
    yang = _growth(series, "memory", "seconds", _asked(shown.run, "inner_steps"))
    imaml = _growth(series, "imaml_memory", "imaml_seconds",
                    _asked(shown.run, "imaml_inner_steps"))  # fmt: skip
    items: list[Table | Figure] = []
    if yang:
        items += [_figure(shown, yang, "yang", _floor(series, "memory")),
                  _table(shown, yang, "yang", "peak"), _table(shown, yang, "yang", "seconds")]
    if imaml:
        items += [_figure(shown, imaml, "rajeswaran", _floor(series, "imaml_memory")),
                  _table(shown, imaml, "rajeswaran", "peak"),
                  _table(shown, imaml, "rajeswaran", "seconds")]  # fmt: skip
    return items


def _asked(run: Run, name: str) -> list[int]:
    return sorted(set(run.settings.get(name) or ()))


def _growth(
    series: Mapping[str, Series], memory: str, seconds: str, asked: Sequence[int]
) -> Grown:
    """By method, such as ``anil/cached``, from the two groups of metrics."""
    found = {}
    for name, peaks in series.items():
        group, _, method = name.partition("/")
        if group == memory and "/" in method:
            times = dict(zip(*series.get(f"{seconds}/{method}", Series([], [])), strict=False))
            points = {k: Point(peak, times.get(k, math.nan))
                      for k, peak in sorted(zip(*peaks, strict=False))}  # fmt: skip
            found[method] = Growth(points, [k for k in asked if k not in points])
    return found


def _floor(series: Mapping[str, Series], memory: str) -> float | None:
    values = series.get(f"{memory}/supervised", Series([], [])).values
    return values[-1] if values else None


PAPERS = {
    "yang": ("Yang et al., Fig. 2", ("ways", "shots", "queries", "pixels")),
    "rajeswaran": (
        "Rajeswaran et al., Fig. 2b",
        ("imaml_ways", "imaml_shots", "imaml_queries", "imaml_pixels"),
    ),
}


def _task(run: Run, paper: str) -> str:
    """``5-way 5-shot, 5 queries a class, 32 x 32 pixels, CNN4-64``."""
    ways, shots, queries, pixels = (run.settings.get(name) for name in PAPERS[paper][1])
    return (f"{ways}-way {shots}-shot, {queries} queries a class, {pixels} x {pixels} pixels,"
            f" CNN4-{run.settings.get('hidden')}, {run.settings.get('device')}")  # fmt: skip


def _figure(shown: Shown, found: Grown, paper: str, floor: float | None) -> Figure:
    title, task = PAPERS[paper][0], _task(shown.run, paper)

    def draw() -> Drawing:
        drawing = Drawing(figsize=(11.5, 5.0), layout="constrained")
        left, right = drawing.subplots(1, 2)
        panel(left, found, "peak", floor)
        panel(right, found, "seconds")
        return drawing

    records = tuple(
        {"method": name, "K": k, "peak_bytes": point.peak, "seconds": point.seconds}
        for name, each in found.items() for k, point in each.points.items()
    )  # fmt: skip
    caption = (f"{title}: peak of live tensors (left) and median time (right) of one task's outer"
               f" step against the inner steps K. {task}, random images.")  # fmt: skip
    name = f"memory_{paper}{shown.suffix}"
    return Figure(name, caption, draw, records, shown.source, shown.notes)


def _table(shown: Shown, found: Grown, paper: str, what: str) -> Table:
    """A row a method, a column a K; what rm_metal saves at K = 5 beside the memory."""
    ks = sorted({k for each in found.values() for k in (*each.points, *each.left_out)})
    is_peak = what == "peak"
    columns = [
        text_column("method", "method"),
        text_column("variant", "variant"),
        *(_k_column(k, is_peak) for k in ks),
    ]
    with_claim = is_peak and CLAIM_AT in found.get(OURS, Growth({}, [])).points
    if with_claim:
        columns.append(
            Column(f"rm_metal below it at K = {CLAIM_AT}, %", lambda r: number(r["saved"], 100, 0))
        )
    unit = "Peak of live tensors, MiB" if is_peak else "Seconds of one task's outer step"
    left = [f"{n} at K = {', '.join(map(str, g.left_out))}" for n, g in found.items() if g.left_out]
    notes = [*shown.notes]
    if left:
        notes.append(
            f"Missing: {'; '.join(left)}: the forecast was above limit_gib="
            f"{shown.run.settings.get('limit_gib')}; a larger one fills them."
        )
    if with_claim:
        notes.append("rm_metal below it: rm_metal with cached features, the package's default.")
    return Table(
        f"memory_{paper}_{what}{shown.suffix}",
        f"{unit}, against inner steps K. {PAPERS[paper][0]}; {_task(shown.run, paper)}.",
        tuple(columns),
        tuple(_record(name, each, ks, is_peak, found) for name, each in found.items()),
        shown.source,
        tuple(notes),
    )


def _k_column(k: int, is_peak: bool) -> Column:
    if is_peak:
        return Column(f"K = {k}", lambda r: number(r[f"K_{k}"], 1 / MIB))
    return Column(f"K = {k}", lambda r: significant(r[f"K_{k}"]))


def _record(name: str, each: Growth, ks: Sequence[int], is_peak: bool, found: Grown) -> Record:
    method, _, variant = name.partition("/")
    values = {k: getattr(p, "peak" if is_peak else "seconds") for k, p in each.points.items()}
    record = {"method": method, "variant": variant.replace("_", " "),
              **{f"K_{k}": values.get(k, math.nan) for k in ks}}  # fmt: skip
    return {**record, "saved": _saved(method, each, found)} if is_peak else record


def _saved(method: str, each: Growth, found: Grown) -> float:
    """Share of this method's memory that rm_metal does without."""
    ours = found.get(OURS, Growth({}, [])).points.get(CLAIM_AT)
    theirs = each.points.get(CLAIM_AT)
    if ours is None or theirs is None or method == "rm_metal":
        return math.nan
    return 1 - ours.peak / theirs.peak
