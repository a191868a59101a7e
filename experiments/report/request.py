"""What was asked of the report, and the runs it is answered from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from experiments.report.runs import Archive, Run
from experiments.report.summary import Summary, load_trainings, summarize
from experiments.report.sweep_state import SweepState
from experiments.tracking.records import RunId


@dataclass(frozen=True)
class Request:
    """What every section gets.

    Attributes:
        sweeps: those asked for, on each benchmark.
    """

    archive: Archive
    sweeps: tuple[SweepState, ...] = ()
    _summaries: dict[RunId, Summary] = field(default_factory=dict)

    def summaries(self, runs: Iterable[Run]) -> list[Summary]:
        """The complete ones of these runs in numbers."""
        runs = [run for run in runs if run.complete]
        new = [run for run in runs if run.id not in self._summaries]
        load_trainings(self.archive, new)
        self._summaries.update({run.id: summarize(run, self.archive) for run in new})
        return [self._summaries[run.id] for run in runs]
