"""Error of the hypergradient against inner steps (Rajeswaran et al. 2019, Fig. 2a).

Reads the metrics that `experiments.papers.hypergradient` records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from experiments.papers.hypergradient.figure import drawing
from experiments.report.archive import Archive, Series
from experiments.report.content import (
    Column,
    Figure,
    Record,
    Section,
    Table,
    file_name,
    significant,
    text_column,
)
from experiments.report.request import Request
from experiments.report.sections.by_run import Shown, by_run

TITLE = "Error of the hypergradient"
WHAT = "Rajeswaran et al., Fig. 2a, and the same for Algorithm 1 of Yang et al."
GROUP = "hypergradient"

Errors = dict[str, dict[str, dict[int, float]]]
"""By problem, method and K."""


def sections(request: Request) -> list[Section]:
    """The figure, and a table a problem."""
    return by_run(request, GROUP, TITLE, WHAT, _items)


def _items(shown: Shown, archive: Archive) -> list[Table | Figure]:
    errors = _errors(archive.all_series(shown.run))
    if not errors:
        return []
    return [_figure(shown, errors), *(_table(shown, p, found) for p, found in errors.items())]


def _errors(series: Mapping[str, Series]) -> Errors:
    found: Errors = {}
    for name, points in series.items():
        group, _, rest = name.partition("/")
        problem, _, method = rest.partition("/")
        if group == GROUP and method:
            by_steps = dict(sorted(zip(*points, strict=False)))
            found.setdefault(problem, {})[method] = by_steps
    return found


def _figure(shown: Shown, errors: Errors) -> Figure:
    records = tuple(
        {"problem": problem, "method": method, "K": k, "relative_error": error}
        for problem, methods in errors.items()
        for method, by_steps in methods.items()
        for k, error in by_steps.items()
    )
    caption = (
        "Relative error of the hypergradient against the exact one, over the inner steps K;"
        f" geometric mean over {shown.run.settings.get('problems')} problems. Solid: implicit, with"
        " the number of conjugate gradient steps; dashed: unrolled."
    )
    name = f"{GROUP}{shown.suffix}"
    return Figure(name, caption, lambda: drawing(errors), records, shown.source, shown.notes)


def _table(shown: Shown, problem: str, found: Mapping[str, Mapping[int, float]]) -> Table:
    ks = sorted({k for by_steps in found.values() for k in by_steps})
    columns = (text_column("method", "method"), *(_column(k) for k in ks))
    return Table(
        file_name(GROUP, problem) + shown.suffix,
        f"Relative error of the hypergradient against inner steps K, {problem.replace('_', ' ')}.",
        columns,
        tuple(_record(method, by_steps, ks) for method, by_steps in found.items()),
        shown.source,
        shown.notes,
    )


def _column(k: int) -> Column:
    return Column(f"K = {k}", lambda record: significant(record[f"K_{k}"]))


def _record(method: str, by_steps: Mapping[int, float], ks: list[int]) -> Record:
    return {"method": method, **{f"K_{k}": by_steps.get(k, math.nan) for k in ks}}
