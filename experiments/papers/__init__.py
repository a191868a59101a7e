"""What the papers say of memory, of the hypergradient's error and of convergence, measured here."""

from experiments import extra  # noqa: F401, I001  (says what to install)

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.report.paper_figures import Metrics, named
from experiments.tracking import record


class Points:
    """What a run records, kept for its tables and its picture."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._curves: dict[str, dict[int, float]] = {}

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Several metrics at one step."""
        record(self._run, values, step)
        for name, value in values.items():
            self._curves.setdefault(name, {})[step] = value

    @property
    def metrics(self) -> Metrics:
        return {name: pd.Series(curve) for name, curve in self._curves.items()}

    def text(self, title: str, pattern: str, digits: str, scale: float = 1.0) -> str:
        """A table for people, a row a metric and a column a step; a dash: not measured."""
        rows = pd.DataFrame(named(self.metrics, pattern)).T / scale
        return f"\n{title}\n{rows.to_string(float_format=f'{{:{digits}}}'.format, na_rep='-')}"
