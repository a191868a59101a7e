"""Time and memory of several steps, side by side."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from experiments.benchmark.steps import Step
from experiments.training.peak_memory import peak_memory


class Cost(NamedTuple):
    """Median seconds, peak bytes, and both over the floor's (time: median of the ratios).

    What was not measured is nan.
    """

    seconds: float
    peak_bytes: float
    time_ratio: float
    memory_ratio: float

    @classmethod
    def of_memory(cls, peak_bytes: int, floor: int) -> Cost:
        return cls(math.nan, peak_bytes, math.nan, peak_bytes / floor)


class Effort(NamedTuple):
    """How often a step is timed: ``repetitions``, fewer once it took ``seconds`` in all (but 3)."""

    repetitions: int = 30
    seconds: float = 20.0


def measure(steps: Mapping[str, Step], effort: Effort, device: str = "cpu") -> dict[str, Cost]:
    """The cost of each step; the first is the floor."""
    with short_collections():
        for step in steps.values():
            step()  # caches, and compilation where there is one
        times = _interleaved(steps, effort, device)
        # Last: torch.compile gives up on what it has seen under a dispatch mode.
        peaks = {name: _peak(step, device) for name, step in steps.items()}
    floor = next(iter(steps))
    return {
        name: Cost(
            statistics.median(taken),
            peaks[name],
            statistics.median(t / f for t, f in zip(taken, times[floor], strict=False)),
            peaks[name] / peaks[floor],
        )
        for name, taken in times.items()
    }


def growth(costs: Iterable[Cost]) -> float:
    """Largest over smallest time ratio."""
    ratios = [cost.time_ratio for cost in costs]
    return max(ratios) / min(ratios)


def _interleaved(
    steps: Mapping[str, Step], effort: Effort, device: str
) -> dict[str, list[float]]:
    """Seconds of each repetition; the floor, the first, takes part in all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, floor, shuffle = list(steps), next(iter(steps)), random.Random(0).shuffle
    for repetition in range(effort.repetitions):
        shuffle(order)
        alive = [n for n in order if repetition < 3 or sum(times[n]) < effort.seconds]
        if not set(alive) - {floor}:
            break
        for name in alive if floor in alive else [floor, *alive]:
            gc.collect()
            times[name].append(seconds_of(steps[name], device))
    return times


def seconds_of(step: Step, device: str = "cpu") -> float:
    """Wall-clock seconds of one call, with nothing pending before or after."""
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


@contextmanager
def short_collections() -> Iterator[None]:
    """Garbage collections that leave out what is there already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def warm_peak(step: Step, device: str) -> float:
    """Peak of the second call: the first leaves the gradients' own memory behind."""
    step()
    return _peak(step, device)


def _peak(step: Step, device: str) -> float:
    gc.collect()
    return peak_memory(step, device)
