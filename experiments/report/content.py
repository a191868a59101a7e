"""What a report is made of: sections of tables and figures, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.figure import Figure as Drawing

from experiments.report.columns import Column, Record
from experiments.tracking.records import RunId


class Source(NamedTuple):
    """The command that makes the runs behind something, and their ids."""

    command: str
    runs: Sequence[RunId] = ()


UNTOLD = Source("")  # whoever made the section says it for all of its items


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


def file_name(*words: str) -> str:
    """A name for files from words such as a benchmark's name, whatever is in it."""
    return re.sub(r"\W+", "_", "_".join(words), flags=re.ASCII).strip("_")[:120]


def shortened(text: str, longest: int = 600) -> str:
    """The text, or its beginning; a run's record may hold a text of any length."""
    return text if len(text) <= longest else f"{text[:longest]}..."
