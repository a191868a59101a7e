"""What a report is made of: sections of tables and figures, as data, and how values are shown.

A record is a row's raw values by name, as the CSV file has them; a column is how people see them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from matplotlib.figure import Figure as Drawing

from experiments.tracking.records import RunId

Record: TypeAlias = Mapping[str, Any]
MISSING = "–"
MIB = 2.0**20


class Source(NamedTuple):
    """The command that makes the runs behind something, and their ids."""

    command: str
    runs: Sequence[RunId] = ()


UNTOLD = Source("")  # whoever made the section says it for all of its items


class Column(NamedTuple):
    """How people see one or more values of a record."""

    header: str  # with the unit
    show: Callable[[Record], str]
    best: Callable[[Record], float] | None = None  # the bold cell has the largest of it
    text: bool = False  # words, to the left; numbers are to the right


@dataclass(frozen=True)
class Table:
    """Written as CSV (the records), LaTeX, Markdown and HTML (the columns)."""

    name: str  # of the files
    caption: str
    columns: Sequence[Column]
    records: Sequence[Record]
    source: Source = UNTOLD
    notes: Sequence[str] = ()
    folded: bool = False  # shown on demand

    def cells(self) -> list[list[tuple[str, bool]]]:
        """By row, each cell's text and whether it is bold: the best of several finite values."""
        columns = []
        for _, show, best, _ in self.columns:
            values = [best(record) if best else math.nan for record in self.records]
            finite = [value for value in values if math.isfinite(value)]
            top = max(finite) if len(finite) > 1 else math.nan
            columns.append([(shortened(show(record)), value == top)
                            for record, value in zip(self.records, values, strict=True)])
        return [list(row) for row in zip(*columns, strict=True)]  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Written as PNG and SVG; its numbers as CSV."""

    name: str
    caption: str  # says what bands and marks are
    draw: Callable[[], Drawing]
    records: Sequence[Record]  # the numbers in it
    source: Source = UNTOLD
    notes: Sequence[str] = ()


Items = Iterator[Table | Figure]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and what follows."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Table | Figure] = ()


def texts(*keys: str, **headers: str) -> list[Column]:
    """Columns of one value each, as it is: under its own name, or KEY=HEADER."""
    named = {key: key.replace("_", " ") for key in keys} | headers
    return [Column(header, lambda record, key=key: str(record.get(key, "")) or MISSING, text=True)
            for key, header in named.items()]  # fmt: skip


def number(header: str, key: str, factor: float = 1.0, digits: int = 1) -> Column:
    """A column of one number, ``factor`` times, rounded."""
    return Column(header, lambda record: rounded(record.get(key), factor, digits))


def mean(header: str, key: str, factor: float = 100.0) -> Column:
    """A column of a mean with its interval: ``KEY_mean`` and ``KEY_half_width``."""
    middle, half = f"{key}_mean", f"{key}_half_width"
    return Column(header, lambda record: plus_minus(record[middle], record[half], factor))


def told(columns: Sequence[Column], records: Sequence[Record]) -> list[Column]:
    """The columns in which some record says something."""
    return [column for column in columns if any(column.show(r) != MISSING for r in records)]


def fewer_lines(records: Sequence[Record], *means: str) -> list[str]:
    """A line for each of these means that is shown, and of fewer seeds than there are runs."""
    return [f"{r['method']}, runs {r['runs']}: only {r[f'{name}_seeds']} of {r['seeds']} seeds have"
            f" a finite {name.replace('_', ' ')} score"
            for name in means for r in records if 0 < r[f"{name}_seeds"] < r["seeds"]]  # fmt: skip


def rounded(value: Any, factor: float = 1.0, digits: int = 1) -> str:
    """A rounded number, or a dash for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{factor * value:.{digits}f}"


def significant(value: float) -> str:
    """A number of any size: ``0.70``, ``1.1e-06``, ``4044``, or a dash."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:#.2g}".rstrip(".")


def plus_minus(value: Any, half_width: Any, factor: float = 1.0, digits: int = 1) -> str:
    """``63.2 ± 1.1``; the mean alone where it has no interval."""
    shown, half = rounded(value, factor, digits), rounded(half_width, factor, digits)
    return shown if MISSING in (shown, half) else f"{shown} ± {half}"


def file_name(*words: str) -> str:
    """A name for files from words such as a benchmark's name, whatever is in it."""
    return re.sub(r"\W+", "_", "_".join(words), flags=re.ASCII).strip("_")[:120]


def shortened(text: str, longest: int = 600) -> str:
    """The text, or its beginning; a run's record may hold a text of any length."""
    return text if len(text) <= longest else f"{text[:longest]}..."
