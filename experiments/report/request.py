"""What was asked of the report, and the runs it is answered from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from experiments.report.archive import Archive, Run
from experiments.report.summary import METRICS, Summary, summarize
from experiments.report.sweep_state import SweepState

TRAIN = "train"


def load_trainings(archive: Archive) -> None:
    """Fetch what `Request.summaries` needs of every complete training."""
    runs = [run for run in archive.of_experiment(TRAIN) if run.complete]
    archive.load(runs, METRICS)
    old = [run for run in runs if not archive.series(run, "validation/training_seconds").steps]
    archive.load(old, ["train/seconds"])


@dataclass(frozen=True)
class Request:
    """What every section gets.

    Attributes:
        sweeps: those asked for, on each benchmark.
    """

    archive: Archive
    sweeps: tuple[SweepState, ...]
    _summaries: dict[object, Summary] = field(default_factory=dict)

    def summaries(self, runs: Iterable[Run]) -> list[Summary]:
        """The complete ones of these runs in numbers."""
        runs = [run for run in runs if run.complete]
        new = [run for run in runs if run.id not in self._summaries]
        self._summaries.update({run.id: summarize(run, self.archive) for run in new})
        return [self._summaries[run.id] for run in runs]

    def started(self) -> list[SweepState]:
        """The sweeps of which there is at least one run, complete or not."""
        return [state for state in self.sweeps if state.attempts]
