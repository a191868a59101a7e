"""One training run in numbers, of which tables make means; and what a report is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from experiments.report.runs import Archive, Run
from experiments.report.sweep_state import SweepState
from experiments.tracking.records import RunId

DROP = 0.10
"""A validation score that is by more than this below the best one before has collapsed."""

SCORES = ("accuracy", "mse")
METRICS = tuple(
    f"{when}/{what}"
    for when in ("validation", "test")
    for what in (*SCORES, "half_width", "training_seconds")
)


class Point(NamedTuple):
    """A validation.

    Attributes:
        seconds: of training until then.
    """

    iteration: int
    seconds: float
    score: float
    half_width: float


@dataclass(frozen=True)
class Summary:
    """A complete run; scores are accuracies in [0, 1], or mean squared errors; nan: not recorded.

    Attributes:
        test, test_half_width: that count, with the 95 % interval over tasks.
        early_stopped: the same of theta at the best validation.
        iterations: outer ones, until the budget was spent if there is one.
        step_cpu_seconds, step_seconds: median of an outer step.
        tensor_bytes, process_bytes: peaks.
        points: all validations.
        within: those in the budget, the one at its end included; all without a budget.
        best: score of `within`.
        collapsed: whether they fell by more than `DROP` from their best.
        collapsed_later: whether the validations after the budget did, and only they.
        diverged: why it left the finite numbers; empty if it did not.
        tests: test score by outer iteration, where recorded.
    """

    run: Run
    score: str
    test: float
    test_half_width: float
    early_stopped: float
    iterations: float
    step_cpu_seconds: float
    step_seconds: float
    tensor_bytes: float
    process_bytes: float
    points: tuple[Point, ...]
    within: tuple[Point, ...]
    best: float
    collapsed: bool
    collapsed_later: bool
    diverged: str
    tests: dict[int, float]


def load_trainings(archive: Archive, runs: Sequence[Run]) -> None:
    """Fetch what `summarize` needs of all these runs at once."""
    archive.load(runs, METRICS)
    old = [run for run in runs if not archive.series(run, "validation/training_seconds").steps]
    archive.load(old, ["train/seconds"])


def summarize(run: Run, archive: Archive) -> Summary:
    """The run in numbers; call `load_trainings` first."""
    score = next((name for name in SCORES if f"test_{name}" in run.result), SCORES[0])
    points = _points(run, archive, score)
    budget = run.setting_number("budget")
    within = _within(points, budget)
    fell = score == "accuracy" and _fell(within)
    return Summary(
        run=run,
        score=score,
        test=run.result_number(f"test_{score}"),
        test_half_width=run.result_number("test_half_width"),
        early_stopped=run.result_number(f"early_stopped_{score}"),
        iterations=_iterations(run, archive, points, budget),
        step_cpu_seconds=run.result_number("step_cpu_seconds"),
        step_seconds=run.result_number("step_seconds"),
        tensor_bytes=run.result_number("step_peak_bytes"),
        process_bytes=run.result_number("process_peak_bytes"),
        points=points,
        within=within,
        best=_best([point.score for point in within], score),
        collapsed=fell,
        collapsed_later=score == "accuracy" and _fell(points) and not fell,
        diverged=str(run.result.get("diverged") or ""),
        tests=dict(zip(*archive.series(run, f"test/{score}"), strict=True)),
    )


def _points(run: Run, archive: Archive, score: str) -> tuple[Point, ...]:
    halves = dict(zip(*archive.series(run, "validation/half_width"), strict=True))
    seconds = _seconds(run, archive)
    return tuple(
        Point(step, seconds.get(step, math.nan), value, halves.get(step, math.nan))
        for step, value in zip(*archive.series(run, f"validation/{score}"), strict=True)
    )


def _seconds(run: Run, archive: Archive) -> dict[int, float]:
    """Seconds of training by outer iteration; older code recorded only those of each step."""
    recorded = archive.series(run, "validation/training_seconds")
    if recorded.steps:
        return dict(zip(*recorded, strict=True))
    steps, seconds = archive.series(run, "train/seconds")
    return dict(zip(steps, accumulate(seconds), strict=True))


def _within(points: tuple[Point, ...], budget: float) -> tuple[Point, ...]:
    """Those up to the one that ends the budget; all without a budget (nan)."""
    spent = [n for n, point in enumerate(points) if budget and point.seconds >= budget]
    return points[: spent[0] + 1] if spent else points


def _iterations(run: Run, archive: Archive, points: Sequence[Point], budget: float) -> float:
    """A run with ``test_at`` goes on after its budget; its iterations are those before."""
    seconds = archive.series(run, "test/training_seconds")
    spent = [step for step, s in zip(*seconds, strict=True) if budget and s >= budget]
    recorded = run.result_number("iterations")
    if spent or math.isfinite(recorded) or not points:
        return float(min(spent)) if spent else recorded
    return float(points[-1].iteration)


def _fell(points: Sequence[Point]) -> bool:
    """Whether one of the scores is more than `DROP` below the best before it."""
    bests = accumulate((point.score for point in points), _larger, initial=-math.inf)
    return any(point.score < best - DROP for point, best in zip(points, bests, strict=False))


def _larger(best: float, score: float) -> float:
    return max(best, score)  # the first one where the other is nan


def _best(values: Sequence[float], score: str) -> float:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    return min(finite) if score == "mse" else max(finite)


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
