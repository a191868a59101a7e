"""What the benchmark found: rows with their bars, as text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def summary(rows: Sequence[Row]) -> str:
    """How many bars are met, and which are not."""
    missed = [(row, bar) for row in rows for bar in row.bars if not bar.met]
    number = sum(len(row.bars) for row in rows)
    lines = [f"{number - len(missed)} of {number} bars met"]
    lines += [f"missed: {row.case}: {row.method}: {bar}" for row, bar in missed]
    return "\n".join(lines)


def as_text(rows: Sequence[Row]) -> str:
    """One aligned block of lines a case."""
    widths = [max(len(row.cells[i]) for row in rows) for i in range(7)]
    widths = [max(width, len(head)) for width, head in zip(widths, HEADER, strict=False)]
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        lines += ["", case, _line(HEADER, widths)]
        lines += [_line(row.cells, widths) for row in rows if row.case == case]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    method, *numbers = cells[:7]
    aligned = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join([method.ljust(widths[0]), *aligned, cells[7]]).rstrip()


def as_markdown(rows: Sequence[Row]) -> str:
    """One table a case, under a heading."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        lines += ["", f"### {case}", "", _markdown(HEADER), "|---" * len(HEADER) + "|"]
        lines += [_markdown(row.cells) for row in rows if row.case == case]
    return "\n".join(lines).lstrip()


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
