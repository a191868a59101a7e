"""What the papers say of memory, of the hypergradient's error and of convergence, measured here."""

from experiments import extra  # noqa: F401, I001  (says what to install)

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.ingredients.model import use_threads
from experiments.report.content import Table
from experiments.report.papers import PARTS, Metrics
from experiments.report.write import markdown_grid
from experiments.sweeps.runs import Run
from experiments.tracking import record
from experiments.tracking.config import RunSettings, Seed, Text, Threads
from experiments.training.outcome import folder_of


class PaperSettings(RunSettings):
    """The settings that all of them have."""

    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of all random numbers
    output: Text = "runs"  # the folder of the pictures


class Points:
    """What a run records, kept for the tables and pictures that it ends with."""

    def __init__(self, run: Any, settings: PaperSettings) -> None:
        use_threads(settings.threads)
        self._run, self._folder = run, folder_of(run, settings.output)
        self._curves: dict[str, dict[int, float]] = {}

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Several metrics at one step."""
        record(self._run, values, step)
        for name, value in values.items():
            self._curves.setdefault(name, {})[step] = value

    @property
    def metrics(self) -> Metrics:
        return {name: pd.Series(curve) for name, curve in self._curves.items()}

    def show(self, experiment: str, result: Mapping[str, float]) -> None:
        """Print the tables that the report makes of such a run, and keep its pictures."""
        _, _, items = PARTS[experiment]  # whatever -n calls the run
        run = Run({"_id": self._run._id, "config": self._run.config, "result": result})
        for item in items(run, self.metrics):
            if isinstance(item, Table):
                print("", item.caption, markdown_grid(item), *item.notes, sep="\n\n")
            else:
                self.keep(item.name, item.draw())

    def keep(self, name: str, drawing: Figure) -> None:
        """A picture, in the run's folder and in the database."""
        picture = self._folder / f"{name}.png"
        drawing.savefig(picture, dpi=120)
        self._run.add_artifact(picture)
        print(f"\npicture: {picture}")
