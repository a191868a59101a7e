"""All that a run has recorded, 8 bytes a value, so that long runs do not grow."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_KINDS = {"q": torch.int64, "d": torch.float64}


class Column:
    """One metric's values: whole numbers until a fraction comes, by outer iteration.

    Iterations that follow one another are not kept one by one.
    """

    def __init__(self, first: int, kind: str) -> None:
        self.values: array[Any] = array(kind)
        self._first = first
        self._at: array[int] | None = None

    def add(self, iteration: int, value: float) -> None:
        """The value of an iteration."""
        if not isinstance(value, int) and self.values.typecode == "q":
            self.values = array("d", self.values)
        if self._at is None and iteration != self._first + len(self.values):
            self._at = array("q", self.iterations())
        if self._at is not None:
            self._at.append(iteration)
        self.values.append(value)

    def iterations(self) -> Sequence[int]:
        """Of the values."""
        return self._at or range(self._first, self._first + len(self.values))

    def state(self) -> tuple[int, torch.Tensor | None, torch.Tensor]:
        """As plain data: the first iteration, all of them if they do not follow it, the values."""
        at = None if self._at is None else torch.tensor(self._at)
        return self._first, at, torch.tensor(self.values, dtype=_KINDS[self.values.typecode])

    @classmethod
    def of(cls, first: int, at: torch.Tensor | None, values: torch.Tensor) -> Column:
        """The inverse of `state`."""
        column = cls(first, {dtype: kind for kind, dtype in _KINDS.items()}[values.dtype])
        column.values.extend(values.tolist())
        column._at = None if at is None else array("q", at.tolist())
        return column


class History:
    """Values of metrics by outer iteration, a column for every metric.

    Example:
        >>> from experiments.training.history import History
        >>> history = History()
        >>> history.add({"train/loss": 0.5}, iteration=1)
        >>> list(history.values("train/loss"))
        [0.5]
    """

    def __init__(self) -> None:
        self._columns: dict[str, Column] = {}

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """One value of each of these metrics."""
        for name, value in values.items():
            if name not in self._columns:
                self._columns[name] = Column(iteration, "q" if isinstance(value, int) else "d")
            self._columns[name].add(iteration, value)

    def values(self, name: str) -> Sequence[float]:
        """A metric's values in the order in which they came; none if it was never recorded."""
        return self._columns[name].values if name in self._columns else array("d")

    def points(self) -> Iterator[tuple[str, int, float]]:
        """Every name, iteration and value; those of one metric in their order."""
        for name, column in self._columns.items():
            for iteration, value in zip(column.iterations(), column.values, strict=True):
                yield name, iteration, value

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors, by name."""
        return {name: column.state() for name, column in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._columns = {name: Column.of(*column) for name, column in state.items()}
