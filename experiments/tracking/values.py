"""What may be recorded: numbers for metrics, anything else as plain data MongoDB can hold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Set
from datetime import datetime, timezone
from typing import Any

from bson import Binary, ObjectId
from sacred.metrics_logger import MetricsLogger
from sacred.serializer import flatten

INT64 = 2**63


def check_name(name: Any) -> str:
    """The metric's name; groups are separated by `/`.

    Raises:
        ValueError: an empty name, one with a dot (reports split names at dots) or a `$`, or one
            that cannot be printed.
    """
    fits = isinstance(name, str) and name and name.isprintable()
    if not fits or "." in name or name.startswith("$"):
        raise ValueError(f"a metric's name is a string such as 'train/loss', got {name!r}")
    return name


def as_number(name: str, value: Any) -> float | int:
    """A Python number from a number or a one-element array or tensor; NaN stays NaN.

    Raises:
        TypeError: anything else.
    """
    number = _item(value)
    if isinstance(number, (bool, int)):
        return int(number) if abs(number) < INT64 else float(number)
    if isinstance(number, float):
        return number
    raise TypeError(
        f"metric {name!r} must be a number or a one-element tensor, got {type(value).__name__}"
        + (f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else "")
    )


def as_step(name: str, step: Any) -> int | None:
    """A Python int, or None for the metric's own counter.

    Raises:
        TypeError: a step that is no whole number, or has more than 64 bits.
    """
    try:
        whole = None if step is None else operator.index(_item(step))
        if whole is None or abs(whole) < INT64:
            return whole
    except TypeError:
        pass
    raise TypeError(f"step of metric {name!r} must be an int of 64 bits, got {step!r}")


def _item(value: Any) -> Any:
    """The Python number in a numpy or torch scalar; other values unchanged."""
    size = getattr(value, "numel", None) or getattr(value, "size", None)
    if not hasattr(value, "item") or (size() if callable(size) else size) != 1:
        return value
    return value.item()


def storable(value: Any) -> Any:
    """Plain data: numpy and torch scalars as numbers, arrays as lists, huge ints as text.

    What MongoDB holds in no string, halves of surrogate pairs, is escaped.
    """
    value = _item(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if abs(value) < INT64 else str(value)
    if value is None or isinstance(value, (bool, float, datetime, ObjectId, Binary)):
        return value
    if isinstance(value, Mapping):
        return {storable(str(k)).replace("\0", "\\0"): storable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [storable(item) for item in value]
    if hasattr(value, "tolist"):
        return storable(value.tolist())
    return flatten(value)


class CheckedMetrics(MetricsLogger):
    """Sacred's metrics logger with the checks made at the call, not in the observer.

    Attributes:
        sink: called with name, value, step and time of every point as it is logged.
    """

    sink: Callable[[str, float, int, datetime], None] | None = None

    def log_scalar_metric(self, metric_name: str, value: Any, step: int | None = None) -> None:
        """Log one value; see `check_name`, `as_number` and `as_step` for what is refused."""
        name = check_name(metric_name)
        number, whole = as_number(name, value), as_step(name, step)
        super().log_scalar_metric(name, number, whole)
        if self.sink is not None:
            now = datetime.now(timezone.utc)
            self.sink(name, number, self._metric_step_counter[name], now)
