"""One training run in numbers, of which tables make means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from experiments.report.archive import Archive, Run

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
    """A complete run; scores are accuracies in [0, 1], or mean squared errors.

    Attributes:
        test, test_half_width: that count, with the 95 % interval over tasks.
        early_stopped: the same of theta at the best validation; nan where it was not asked for.
        iterations: outer ones, until the budget was spent if there is one.
        step_cpu_seconds, step_seconds: median of an outer step.
        tensor_bytes, process_bytes: peaks.
        points: all validations.
        within: those in the budget, the one at its end included; all without a budget.
        best: score of `within`.
        collapsed: whether they fell by more than `DROP` from their best.
        collapsed_later: whether the validations after the budget did, and only they.
        diverged: why it left the finite numbers; empty if it did not.
        tests: test score and half width by outer iteration, where recorded.
    """

    run: Run
    score: str
    test: float
    test_half_width: float
    early_stopped: float
    iterations: int | None
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
    tests: dict[int, tuple[float, float]]


def summarize(run: Run, archive: Archive) -> Summary:
    """The run in numbers; nan where the database has none. Load `METRICS` first."""
    result, score = run.result, score_of(run)
    points = _points(run, archive, score)
    budget = run.settings.get("budget")
    within = _within(points, budget)
    fell, later = _fell(within), _fell(points)
    return Summary(
        run=run,
        score=score,
        test=_number(result.get(f"test_{score}")),
        test_half_width=_number(result.get("test_half_width")),
        early_stopped=_number(result.get(f"early_stopped_{score}")),
        iterations=_iterations(run, archive, points, budget),
        step_cpu_seconds=_number(result.get("step_cpu_seconds")),
        step_seconds=_number(result.get("step_seconds")),
        tensor_bytes=_number(result.get("step_peak_bytes")),
        process_bytes=_number(result.get("process_peak_bytes")),
        points=points,
        within=within,
        best=_best([point.score for point in within], score),
        collapsed=score == "accuracy" and fell,
        collapsed_later=score == "accuracy" and later and not fell,
        diverged=str(result.get("diverged") or ""),
        tests=_tests(run, archive, score),
    )


def score_of(run: Run) -> str:
    """The name of its score."""
    return next((name for name in SCORES if f"test_{name}" in run.result), SCORES[0])


def _points(run: Run, archive: Archive, score: str) -> tuple[Point, ...]:
    scores = archive.series(run, f"validation/{score}")
    halves = dict(zip(*archive.series(run, "validation/half_width"), strict=False))
    seconds = _seconds(run, archive)
    return tuple(
        Point(step, _number(seconds.get(step)), _number(value), _number(halves.get(step)))
        for step, value in zip(*scores, strict=False)
    )


def _seconds(run: Run, archive: Archive) -> dict[int, float]:
    """Seconds of training by outer iteration; older code recorded only those of each step."""
    recorded = archive.series(run, "validation/training_seconds")
    if recorded.steps:
        return dict(zip(*recorded, strict=False))
    steps, seconds = archive.series(run, "train/seconds")
    return dict(zip(steps, accumulate(seconds), strict=False))


def _tests(run: Run, archive: Archive, score: str) -> dict[int, tuple[float, float]]:
    means = archive.series(run, f"test/{score}")
    halves = dict(zip(*archive.series(run, "test/half_width"), strict=False))
    return {
        step: (_number(mean), _number(halves.get(step)))
        for step, mean in zip(*means, strict=False)
    }


def _within(points: tuple[Point, ...], budget: float | None) -> tuple[Point, ...]:
    """Those up to the one that ends the budget; all without a budget."""
    spent = [n for n, point in enumerate(points) if budget and point.seconds >= budget]
    return points[: spent[0] + 1] if spent else points


def _iterations(
    run: Run, archive: Archive, points: tuple[Point, ...], budget: float | None
) -> int | None:
    """A run with ``test_at`` goes on after its budget; its iterations are those before."""
    seconds = archive.series(run, "test/training_seconds")
    spent = [step for step, s in zip(*seconds, strict=False) if budget and s >= budget]
    if spent:
        return min(spent)
    recorded = run.result.get("iterations")
    if recorded is None:
        recorded = points[-1].iteration if points else None
    return None if recorded is None else int(recorded)


def _fell(points: tuple[Point, ...]) -> bool:
    """Whether one of the scores is more than `DROP` below the best before it."""
    best = -math.inf
    for point in points:
        if point.score < best - DROP:
            return True
        best = max(best, point.score)
    return False


def _best(values: list[float], score: str) -> float:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    return min(finite) if score == "mse" else max(finite)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
