"""Peak memory against inner steps: Yang et al. (2025), Fig. 2; Rajeswaran et al. (2019), Fig. 2b.

    python -m experiments.papers.memory
    python -m experiments.papers.memory with quick

One task's outer step, K by K, as far as the memory allows.
"""

from __future__ import annotations

import statistics
import timeit
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.ingredients import model
from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.ingredients.model import ModelSettings, within_limits
from experiments.papers import PaperSettings, Points
from experiments.tracking import TrackedExperiment
from experiments.tracking.config import Count, Counts, Positive, Text
from experiments.training.algorithms import Algorithm
from experiments.training.episodes import Episode
from experiments.training.peak_memory import peak_memory, process_peak
from l2l_implicit import UnsolvedWarning

Pixels = Annotated[int, Field(ge=16, le=10_000)]  # four poolings halve them


class MemorySettings(PaperSettings):
    """The settings of this experiment."""

    inner_steps: Counts = [1, 2, 5, 10, 20, 50, 100]  # K, Yang et al.
    ways: Count = 5  # classes a task
    shots: Count = 5  # support images a class
    queries: Count = 5  # query images a class
    pixels: Pixels = 32  # of an image's side
    hidden: Count = 64  # filters a layer, those of CIFAR-FS
    imaml_inner_steps: Counts = [1, 2, 4, 8, 16, 32]  # K, Rajeswaran et al.
    imaml_ways: Count = 20  # of Omniglot-like images, one channel
    imaml_shots: Count = 5  # support images a class
    imaml_queries: Count = 1  # query images a class
    imaml_pixels: Pixels = 28  # of an image's side
    limit_gib: Positive = 4.0  # a step that is forecast to take more is left out
    repetitions: Count = 3  # of the timing
    device: Text = "cpu"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one


ex = TrackedExperiment("memory", settings=MemorySettings)


@ex.named_config
def quick() -> None:
    """Smaller networks and tasks, the small K, each timed once: under a minute."""
    inner_steps = [1, 2, 5, 10]
    hidden = 16
    imaml_inner_steps = [1, 2, 4]
    imaml_ways = 5
    repetitions = 1


PUBLISHED = {"features": "as_published", "batch_norm": "separately"}
# Gradient steps, of which all K are taken; the default, Newton, ends where the problem is solved.
# One task in memory at a time.
OURS = {"name": "rm_metal", "step": "gradient", "together": False}
Method = Mapping[str, Any]
"""A name of the algorithm table, and what is changed there."""

YANG: dict[str, Method] = {
    "rm_metal/cached": OURS,
    "rm_metal/as_published": {**OURS, **PUBLISHED},
    "maml/as_published": {"name": "maml"},
    "anil/as_published": {"name": "anil", **PUBLISHED},
    "anil/cached": {"name": "anil"},
    "itd_bio/as_published": {"name": "itd_bio", **PUBLISHED},
    "itd_bio/cached": {"name": "itd_bio"},
}
RAJESWARAN: dict[str, Method] = {
    "imaml/gradient": {"name": "imaml_gd", "step": "gradient"},
    "maml/as_published": {"name": "maml"},
    "fomaml/as_published": {"name": "fomaml"},
}


class Shape(NamedTuple):
    """What a task looks like: ``ways * (shots + queries)`` square images; filters of its CNN4."""

    ways: int
    shots: int
    queries: int
    pixels: int
    hidden: int
    channels: int = 3


class Point(NamedTuple):
    """The peak of live tensors in bytes, and seconds (median), of one task's outer step."""

    peak: float
    seconds: float


def episode(shape: Shape, device: torch.device) -> Episode:
    """Random images: memory and time do not depend on what they show."""
    number = shape.ways * (shape.shots + shape.queries)
    size = (number, shape.channels, shape.pixels, shape.pixels)
    labels = torch.arange(shape.ways, device=device)
    inputs = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    return Episode(inputs, *(labels.repeat_interleave(n) for n in (shape.shots, shape.queries)))


def build(method: Method, shape: Shape, device: torch.device) -> Algorithm:
    """The algorithm in training, with one inner step."""
    settings = AlgorithmSettings.of({**method, "steps": 1})
    # Second derivatives of batch norm are slow in channels_last.
    backbone, width = _backbone(shape, channels_last=settings.scope == "head")
    sizes = (width, shape.ways, shape.ways)
    return make_algorithms(settings, backbone.to(device), *sizes, cross_entropy, device).training


def _backbone(shape: Shape, channels_last: bool) -> tuple[nn.Module, int]:
    settings = {"name": "cnn4", "hidden": shape.hidden, "channels_last": channels_last}
    images = (shape.channels, shape.pixels, shape.pixels)
    return model.build_backbone(images, ModelSettings.of(settings, "model"))


def floor(shape: Shape, device: torch.device) -> float:
    """Peak of one supervised forward and backward pass over all images of the task."""
    torch.manual_seed(0)
    backbone, width = _backbone(shape, channels_last=True)
    network = nn.Sequential(backbone, nn.Linear(width, shape.ways)).to(device)
    task = episode(shape, device)
    labels = torch.cat([task.support_targets, task.query_targets])

    def step() -> None:
        cross_entropy(network(task.inputs), labels).backward()

    step()  # leaves the gradients' own memory behind
    return peak_memory(step, device)


def growth(
    method: Method, shape: Shape, steps: Sequence[int], limit: float, repetitions: int,
    device: torch.device, tick: Callable[[int], object],
) -> dict[int, Point]:  # fmt: skip
    """Measure at every K, ascending, until the next would take more than ``limit`` bytes."""
    torch.manual_seed(0)
    algorithm, task = build(method, shape, device), episode(shape, device)

    def step() -> None:
        algorithm.learn([task], lambda predictions, targets: 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # leaves the gradients' own memory behind
    points: dict[int, Point] = {}
    for algorithm.steps in takewhile(lambda k: forecast(points, k) <= limit, steps):
        peak = peak_memory(step, device)
        times = timeit.repeat(step, repeat=repetitions, number=1)
        points[algorithm.steps] = Point(peak, statistics.median(times))
        tick(1)
    return points


def forecast(points: dict[int, Point], steps: int) -> float:
    """Bytes that K = ``steps`` will take, by a straight line through the last two peaks.

    0 where fewer than two points are known.
    """
    if len(points) < 2:
        return 0.0
    (k0, before), (k1, last) = list(points.items())[-2:]
    return last.peak + (last.peak - before.peak) / (k1 - k0) * (steps - k1)


@ex.automain
@within_limits()
def memory(_run: Any) -> dict[str, float]:
    """Print the tables; returns the peak of the process."""
    c = MemorySettings.of(_run.config)
    device = model.device_of(c.device)
    omniglot = (c.imaml_ways, c.imaml_shots, c.imaml_queries, c.imaml_pixels, c.hidden, 1)
    papers = {
        "": (YANG, c.inner_steps, Shape(c.ways, c.shots, c.queries, c.pixels, c.hidden)),
        "imaml_": (RAJESWARAN, c.imaml_inner_steps, Shape(*omniglot)),
    }
    points, limit = Points(_run, c), c.limit_gib * 2**30
    total = sum(len(methods) * len(set(steps)) for methods, steps, _ in papers.values())
    with warnings.catch_warnings(), tqdm(total=total, desc="points") as bar:
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        for prefix, (methods, steps, shape) in papers.items():
            points.record({f"{prefix}memory/supervised": floor(shape, device)}, 0)
            for name, method in methods.items():
                measured = growth(method, shape, sorted(set(steps)), limit, c.repetitions, device,
                                  bar.update)  # fmt: skip
                for k, (peak, seconds) in measured.items():  # as soon as it is there
                    values = {f"{prefix}memory/{name}": peak, f"{prefix}seconds/{name}": seconds}
                    points.record(values, k)
    result = {"process_peak_bytes": float(process_peak())}
    points.show("memory", result)
    return result
