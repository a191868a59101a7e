"""What the benchmark found: rows with their bars, as text, as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from tabulate import tabulate

from experiments.benchmark.measure import Cost


class Bar(NamedTuple):
    """What was asked of a figure: at most ``limit``, or at least."""

    quantity: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{self.quantity} {self.value:.4f} {sign} {self.limit:g} {verdict}"


class Row(NamedTuple):
    """One line of the table; ``cost`` is None where a bar alone is the result."""

    case: str
    method: str
    steps: int | None = None
    cg_steps: int | None = None
    cost: Cost | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def cells(self) -> list[str]:
        """Without the case: method, K, N, ms, time, MiB, memory, bars."""
        numbers = [""] * 4
        if self.cost is not None:
            seconds, peak, time, memory = self.cost
            figures = ((1000 * seconds, 1), (time, 3), (peak / 2**20, 1), (memory, 3))
            numbers = [f"{x:.{digits}f}" if math.isfinite(x) else "" for x, digits in figures]
        counts = ["" if n is None else str(n) for n in (self.steps, self.cg_steps)]
        return [self.method, *counts, *numbers, "; ".join(map(str, self.bars))]

    @property
    def metrics(self) -> dict[str, float]:
        """All figures by name."""
        values: dict[str, float] = {} if self.cost is None else self.cost._asdict()
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        return values | {f"bar: {bar.quantity}": bar.value for bar in self.bars}


HEADER = ["", "K", "N", "ms", "time", "MiB", "memory", "bars"]
MARKERS = "os^vD<>pPX*"


def summary(rows: Sequence[Row]) -> str:
    """How many bars are met, and which are not."""
    missed = [(row, bar) for row in rows for bar in row.bars if not bar.met]
    number = sum(len(row.bars) for row in rows)
    lines = [f"{number - len(missed)} of {number} bars met"]
    lines += [f"missed: {row.case}: {row.method}: {bar}" for row, bar in missed]
    return "\n".join(lines)


def as_text(rows: Sequence[Row]) -> str:
    """One aligned block of lines a case."""
    return "\n".join(f"\n{case}\n{_table(own, 'plain')}" for case, own in _by_case(rows))


def as_markdown(rows: Sequence[Row]) -> str:
    """One table a case, under a heading."""
    return "\n\n".join(f"### {case}\n\n{_table(own, 'github')}" for case, own in _by_case(rows))


def _by_case(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(case, [row for row in rows if row.case == case])
            for case in dict.fromkeys(row.case for row in rows)]  # fmt: skip


def _table(rows: Sequence[Row], style: str) -> str:
    align = ["left", *["right"] * 6, "left"]
    cells = [row.cells for row in rows]
    return tabulate(cells, HEADER, style, colalign=align, disable_numparse=True)


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Time and memory over those of the supervised step against K, log-log, one line a method.

    Args:
        path: the PNG to write.
        title: what was run.
        rows: of the case ``peers``.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    both = figure.subplots(1, 2)
    measured = [row for row in rows if row.cost is not None and row.steps is not None]
    for axes, what in zip(both, ("time", "memory"), strict=True):
        for number, name in enumerate(dict.fromkeys(row.method for row in measured)):
            of = [row for row in measured if row.method == name]
            style = "-" if name.startswith("implicit") else "--"
            ratios = [getattr(row.cost, f"{what}_ratio") for row in of]
            look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
            axes.loglog([row.steps for row in of], ratios, style, label=name, alpha=0.8, **look)
        axes.axhline(1.0, color="0.7", label="supervised")
        axes.set(xlabel="inner steps K (and N = K)", ylabel=f"{what} over the supervised step's")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
