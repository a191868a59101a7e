"""What an outer step costs, in units of one supervised step on the same images.

    python -m experiments.benchmark
    python -m experiments.benchmark with quick

Every method sees the same backbone and the same images; repetitions are interleaved, times are
medians, memory is the peak of live tensors beyond those alive before the step.
"""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)

# isort: split
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from learn2learn.algorithms import MAML
from torch import Tensor, nn
from tqdm import tqdm

from experiments.ingredients import build_backbone
from experiments.peak_memory import peak_memory
from experiments.tracking import TrackedExperiment, record
from l2l_implicit import ImplicitCGHead, UnsolvedWarning

ex = TrackedExperiment("benchmark")


@ex.config
def defaults() -> None:
    ways = 5
    shots = 5
    queries = 5
    pixels = 32
    steps = 20  # inner steps K
    cg_steps = 20  # conjugate gradient steps N
    repetitions = 30
    threads = 1
    seed = 0
    backbone = "cnn4"  # cnn4 or resnet12
    hidden = 64  # filters a layer (cnn4)
    channels_last = True  # for every method


@ex.named_config
def quick() -> None:
    """Five repetitions: under a minute, and rougher."""
    repetitions = 5


class Problem(NamedTuple):
    """One task and a network; each method gets a head of its own, equal at the start."""

    backbone: nn.Module
    head: nn.Linear
    images: Tensor
    labels: Tensor
    support: int
    steps: int
    cg_steps: int

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)


def supervised(problem: Problem) -> Callable[[], None]:
    """The floor: forward and backward over all images of the task."""
    head = copy.deepcopy(problem.head)

    def step() -> None:
        problem.loss(head(problem.backbone(problem.images)), problem.labels).backward()

    return step


def loss_tensors(problem: Problem, head: nn.Module) -> Callable[[], None]:
    """learn2learn's loop: ``adapt(loss)`` K times, on features computed once."""

    def step() -> None:
        features, learner = problem.backbone(problem.images), head.clone()
        support, query = features[: problem.support], features[problem.support :]
        labels = problem.labels[: problem.support]
        for _ in range(problem.steps):
            learner.adapt(problem.loss(learner(support), labels))
        problem.loss(learner(query), problem.labels[problem.support :]).backward()

    return step


def closure(problem: Problem, head: ImplicitCGHead) -> Callable[[], None]:
    """``adapt(closure, steps=K)``."""

    def step() -> None:
        features, learner = problem.backbone(problem.images), head.clone()
        support, query = features[: problem.support], features[problem.support :]
        labels = problem.labels[: problem.support]
        learner.adapt(lambda: problem.loss(learner(support), labels), steps=problem.steps)
        problem.loss(learner(query), problem.labels[problem.support :]).backward()

    return step


def methods(problem: Problem) -> dict[str, Callable[[], None]]:
    """Name to step."""

    def implicit(step: str) -> ImplicitCGHead:
        head = copy.deepcopy(problem.head)
        return ImplicitCGHead(head, 0.1, step=step, cg_steps=problem.cg_steps)

    return {
        "supervised": supervised(problem),
        "implicit, newton, adapt(loss)": loss_tensors(problem, implicit("newton")),
        "implicit, newton, adapt(closure)": closure(problem, implicit("newton")),
        "implicit, gradient, adapt(loss)": loss_tensors(problem, implicit("gradient")),
        "implicit, gradient, adapt(closure)": closure(problem, implicit("gradient")),
        "ANIL, features cached": loss_tensors(
            problem, MAML(copy.deepcopy(problem.head), 0.1)
        ),
    }


class Cost(NamedTuple):
    """Median seconds, peak bytes, and the median of the ratio to the floor, repetition-wise."""

    seconds: float
    peak_bytes: int
    time_ratio: float


def measure(steps: dict[str, Callable[[], None]], repetitions: int) -> dict[str, Cost]:
    """The cost of each step; the first is the floor."""
    peaks = {name: _warm_peak(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(repetitions), desc="repetitions"):
        for name, step in steps.items():
            times[name].append(_seconds(step))
    floor = next(iter(times.values()))
    return {
        name: Cost(
            statistics.median(taken),
            peaks[name],
            statistics.median(t / f for t, f in zip(taken, floor, strict=True)),
        )
        for name, taken in times.items()
    }


def _warm_peak(step: Callable[[], None]) -> int:
    """Peak of the second call: the first leaves the gradients' own memory behind."""
    step()
    return peak_memory(step)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(costs: dict[str, Cost]) -> str:
    """The costs as lines of text; ratios are to the first row."""
    floor = next(iter(costs.values()))
    lines = [f"{'one task':36}{'ms':>8}{'time':>8}{'MiB':>8}{'memory':>8}"]
    for name, cost in costs.items():
        memory = cost.peak_bytes / floor.peak_bytes
        lines.append(
            f"{name:36}{1000 * cost.seconds:8.1f}{cost.time_ratio:8.3f}"
            f"{cost.peak_bytes / 2**20:8.1f}{memory:8.3f}"
        )
    return "\n".join(lines)


@ex.automain
def benchmark(
    _run: Any,
    ways: int,
    shots: int,
    queries: int,
    pixels: int,
    steps: int,
    cg_steps: int,
    repetitions: int,
    threads: int,
    seed: int,
    backbone: str,
    hidden: int,
    channels_last: bool,
) -> dict[str, float]:
    """Print the table; returns the time ratios."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    shape = torch.Size((3, pixels, pixels))
    network, width = build_backbone(shape, backbone, hidden, channels_last)
    labels = torch.arange(ways).repeat_interleave(shots), torch.arange(ways).repeat(queries)
    images = torch.randn(ways * (shots + queries), *shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    problem = Problem(
        network,
        nn.Linear(width, ways),
        images.contiguous(memory_format=layout),
        torch.cat(labels),
        ways * shots,
        steps,
        cg_steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        costs = measure(methods(problem), repetitions)
    for index, (name, cost) in enumerate(costs.items()):
        record(_run, {f"{name}/{key}": value for key, value in cost._asdict().items()}, index)
    print(f"\n{ways}-way {shots}-shot, {width} features, K = {steps}, N = {cg_steps}")
    print(table(costs))
    return {name: cost.time_ratio for name, cost in costs.items()}
