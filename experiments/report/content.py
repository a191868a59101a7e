"""What a report is made of: sections of tables and figures, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from matplotlib.figure import Figure as Drawing

from experiments.tracking.records import RunId

Record: TypeAlias = Mapping[str, Any]
"""A row's raw values by name, as the CSV file has them."""

MISSING = "–"
MIB = 2.0**20
LONGEST = 600
"""Characters of a cell; a run's record may hold a text of any length."""
LONGEST_NAME = 120


@dataclass(frozen=True)
class Column:
    """How people see one or more values of a record.

    Args:
        header: with the unit.
        show: the text of a record's cell.
        best: what the bold cell of the column has the largest of; None: no bold cell.
        text: whether it holds words, to the left; numbers are to the right.
    """

    header: str
    show: Callable[[Record], str]
    best: Callable[[Record], float] | None = None
    text: bool = False


@dataclass(frozen=True)
class Source:
    """Where something comes from.

    Args:
        command: that makes the runs.
        runs: their ids.
    """

    command: str
    runs: tuple[RunId, ...] = ()


@dataclass(frozen=True)
class Table:
    """Written as CSV (the records), LaTeX, Markdown and HTML (the columns).

    Args:
        name: of the files.
        folded: whether the page shows it only on demand.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    records: tuple[Record, ...]
    source: Source
    notes: tuple[str, ...] = ()
    folded: bool = False

    def cells(self) -> list[list[tuple[str, bool]]]:
        """By row, each cell's text and whether it is bold."""
        best = {column: self._best_rows(column) for column in self.columns}
        return [[(shortened(column.show(record)), number in best[column])
                 for column in self.columns]
                for number, record in enumerate(self.records)]  # fmt: skip

    def _best_rows(self, column: Column) -> set[int]:
        """The rows whose cell of this column is bold: the best of several finite values."""
        if column.best is None:
            return set()
        values = [column.best(record) for record in self.records]
        finite = [value for value in values if math.isfinite(value)]
        return {n for n, v in enumerate(values) if len(finite) > 1 and v == max(finite)}


@dataclass(frozen=True)
class Figure:
    """Written as PNG and SVG; its numbers as CSV.

    Args:
        name: of the files.
        caption: says what bands and marks are.
        draw: makes the picture.
        records: the numbers in it.
    """

    name: str
    caption: str
    draw: Callable[[], Drawing]
    records: tuple[Record, ...]
    source: Source
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and what follows."""

    title: str
    text: tuple[str, ...] = ()
    items: tuple[Table | Figure, ...] = field(default=())


def file_name(*words: str) -> str:
    """A name for files from words such as a benchmark's name, whatever is in it."""
    return re.sub(r"\W+", "_", "_".join(words), flags=re.ASCII).strip("_")[:LONGEST_NAME]


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def texts(*keys: str) -> tuple[Column, ...]:
    """Columns of one value each, shown as it is, under its own name."""
    return tuple(text_column(key.replace("_", " "), key) for key in keys)


def text_column(header: str, key: str) -> Column:
    """A column of one value, shown as it is."""
    return Column(header, lambda record: str(record.get(key, "")) or MISSING, text=True)


def number_column(header: str, key: str, factor: float = 1.0, digits: int = 1) -> Column:
    """A column of one number, ``factor`` times, rounded."""
    return Column(header, lambda record: number(record.get(key), factor, digits))


def mean_column(
    header: str, key: str, factor: float = 1.0, best: Callable[[Record], float] | None = None
) -> Column:
    """A column of a mean with its interval: ``KEY_mean`` and ``KEY_half_width``."""
    return Column(
        header, lambda r: plus_minus(r[f"{key}_mean"], r[f"{key}_half_width"], factor), best
    )


def number(value: Any, factor: float = 1.0, digits: int = 1) -> str:
    """A rounded number, or a dash for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{factor * value:.{digits}f}"


def significant(value: Any, digits: int = 2) -> str:
    """A number of any size: ``0.70``, ``1.1e-06``, ``4044``, or a dash."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 10**digits <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def plus_minus(mean: Any, half_width: Any, factor: float = 1.0, digits: int = 1) -> str:
    """``63.2 ± 1.1``; the mean alone where it has no interval."""
    shown, half = number(mean, factor, digits), number(half_width, factor, digits)
    return shown if MISSING in (shown, half) else f"{shown} ± {half}"


def listed(names: Iterable[str]) -> tuple[str, ...]:
    """A note that names what is missing; none if nothing is."""
    told = ", ".join(names)
    return (f"Missing: {told}.",) if told else ()
