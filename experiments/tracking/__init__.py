"""Experiments whose configuration is checked and whose record is never lost.

Example:
    >>> from experiments.tracking import TrackedExperiment, UserError, record
    >>> ex = TrackedExperiment("train", ingredients=[data])  # doctest: +SKIP
    >>> @ex.automain  # doctest: +SKIP
    ... def main(_run, steps):
    ...     record(_run, {"train/loss": 0.5, "train/accuracy": 0.8}, step=0)
"""

from experiments import extra  # noqa: F401, I001  (first: it says what to install)
from experiments.tracking.database import open_database
from experiments.tracking.errors import TrackingError, UserError, wrong
from experiments.tracking.experiment import TrackedExperiment, TrackedIngredient, record
from experiments.tracking.signals import Terminated

__all__ = [
    "Terminated", "TrackedExperiment", "TrackedIngredient", "TrackingError", "UserError",
    "open_database", "record", "wrong",
]  # fmt: skip
