"""How the values of a table's records are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

Record: TypeAlias = Mapping[str, Any]
"""A row's raw values by name, as the CSV file has them."""

MISSING = "–"
MIB = 2.0**20


class Column(NamedTuple):
    """How people see one or more values of a record."""

    header: str  # with the unit
    show: Callable[[Record], str]
    best: Callable[[Record], float] | None = None  # the bold cell has the largest of it
    text: bool = False  # words, to the left; numbers are to the right


def texts(*keys: str, **headers: str) -> list[Column]:
    """Columns of one value each, as it is: under its own name, or KEY=HEADER."""
    named = {key: key.replace("_", " ") for key in keys} | headers
    return [Column(header, lambda record, key=key: str(record.get(key, "")) or MISSING, text=True)
            for key, header in named.items()]  # fmt: skip


def number(header: str, key: str, factor: float = 1.0, digits: int = 1) -> Column:
    """A column of one number, ``factor`` times, rounded."""
    return Column(header, lambda record: rounded(record.get(key), factor, digits))


def mean(
    header: str, key: str, factor: float = 1.0, best: Callable[[Record], float] | None = None
) -> Column:
    """A column of a mean with its interval: ``KEY_mean`` and ``KEY_half_width``."""
    middle, half = f"{key}_mean", f"{key}_half_width"
    return Column(header, lambda record: plus_minus(record[middle], record[half], factor), best)


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
