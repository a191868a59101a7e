"""Peak memory and time of one task's outer step, K by K, as far as the memory allows."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from experiments.benchmark.measure import seconds_of, short_collections, warm_peak
from experiments.papers.memory.methods import Method, Shape, build, episode, supervised
from experiments.report.paper_figures import Growth, Point
from experiments.training.algorithms import Algorithm
from experiments.training.episodes import Episode
from experiments.training.peak_memory import peak_memory

Tick = Callable[[int], object]


class Effort(NamedTuple):
    """How much memory a step may take, in bytes, and how often it is timed after that."""

    limit: float
    repetitions: int


def floor(shape: Shape, device: torch.device) -> float:
    """Peak of one supervised forward and backward pass over all images of the task."""
    torch.manual_seed(0)
    network, task = supervised(shape, device), episode(shape, device)
    labels = torch.cat([task.support_targets, task.query_targets])
    return warm_peak(lambda: cross_entropy(network(task.inputs), labels).backward(), str(device))


def growth(
    method: Method, shape: Shape, steps: Sequence[int], effort: Effort, device: torch.device,
    tick: Tick,
) -> Growth:  # fmt: skip
    """Measure at every K, ascending, until the next would take more memory than is allowed.

    The forecast is a straight line through the last two peaks.
    """
    torch.manual_seed(0)
    algorithm, task = build(method, shape, device), episode(shape, device)
    _step(algorithm, task, 1)()  # leaves the gradients' own memory behind
    found = Growth({}, [])
    with short_collections():
        for k in steps:
            if found.left_out or forecast(found.points, k) > effort.limit:
                found.left_out.append(k)
            else:
                found.points[k] = _measure(_step(algorithm, task, k), effort.repetitions, device)
            tick(1)
    return found


def forecast(points: dict[int, Point], steps: int) -> float:
    """Bytes that K = ``steps`` will take; 0 where fewer than two points are known."""
    if len(points) < 2:
        return 0.0
    (k0, before), (k1, last) = list(points.items())[-2:]
    return last.peak + (last.peak - before.peak) / (k1 - k0) * (steps - k1)


def _step(algorithm: Algorithm, task: Episode, steps: int) -> Callable[[], None]:
    def step() -> None:
        algorithm.steps = steps
        algorithm.learn([task], lambda predictions, targets: 0.0)

    return step


def _measure(step: Callable[[], None], repetitions: int, device: torch.device) -> Point:
    gc.collect()
    peak = peak_memory(step, device)
    times = [seconds_of(step, str(device)) for _ in range(repetitions)]
    return Point(peak, statistics.median(times))
