"""Experiments whose configuration is checked and whose record is never lost.

Example:
    >>> from experiments.tracking import TrackedExperiment, UserError, record
    >>> ex = TrackedExperiment("train", ingredients=[data])  # doctest: +SKIP
    >>> @ex.automain  # doctest: +SKIP
    ... def main(_run, steps):
    ...     record(_run, {"train/loss": 0.5, "train/accuracy": 0.8}, step=0)
"""

import warnings

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # Sacred imports it

from experiments.tracking.database import open_database  # noqa: E402
from experiments.tracking.errors import TrackingError, UserError  # noqa: E402
from experiments.tracking.experiment import TrackedExperiment, record  # noqa: E402
from experiments.tracking.ingredient import TrackedIngredient  # noqa: E402

__all__ = [
    "TrackedExperiment",
    "TrackedIngredient",
    "TrackingError",
    "UserError",
    "open_database",
    "record",
]
