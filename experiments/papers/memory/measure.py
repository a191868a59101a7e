"""What is measured, and how: the algorithms of `experiments.ingredients.algorithm_table`, in their
variants; peak memory and time of one task's outer step, K by K, as far as the memory allows."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.benchmark.measure import seconds_of, short_collections, warm_peak
from experiments.benchmark.problem import Shape
from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.ingredients.model import ModelSettings, build_backbone
from experiments.report.paper_figures import Growth, Point
from experiments.training.algorithms import Algorithm
from experiments.training.episodes import Episode
from experiments.training.peak_memory import peak_memory

Tick = Callable[[int], object]
PUBLISHED = {"features": "as_published", "batch_norm": "separately"}
# Gradient steps, of which all K are taken; the default, Newton, ends where the problem is solved.
GRADIENT = {"step": "gradient"}


class Method(NamedTuple):
    """A name of the algorithm table, and what is changed there."""

    name: str
    changes: Mapping[str, Any]


YANG: dict[str, Method] = {
    "rm_metal/cached": Method("rm_metal", GRADIENT),
    "rm_metal/as_published": Method("rm_metal", {**GRADIENT, **PUBLISHED}),
    "maml/as_published": Method("maml", {}),
    "anil/as_published": Method("anil", PUBLISHED),
    "anil/cached": Method("anil", {}),
    "itd_bio/as_published": Method("itd_bio", PUBLISHED),
    "itd_bio/cached": Method("itd_bio", {}),
}
RAJESWARAN: dict[str, Method] = {
    "imaml/gradient": Method("imaml_gd", GRADIENT),
    "maml/as_published": Method("maml", {}),
    "fomaml/as_published": Method("fomaml", {}),
}


def episode(shape: Shape, device: torch.device) -> Episode:
    """Random images: memory and time do not depend on what they show."""
    number = shape.ways * (shape.shots + shape.queries)
    size = (number, shape.channels, shape.pixels, shape.pixels)
    labels = torch.arange(shape.ways, device=device)
    inputs = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    sets = (shape.shots, shape.queries)
    return Episode(inputs, *(labels.repeat_interleave(n) for n in sets))


def build(method: Method, shape: Shape, device: torch.device) -> Algorithm:
    """The algorithm in training, with one inner step."""
    own = AlgorithmSettings.of({"name": method.name, **method.changes, "steps": 1})
    changes = {} if own.together is None else {"together": False}  # one task in memory at a time
    settings = own.model_copy(update=changes)
    # Second derivatives of batch norm are slow in channels_last.
    backbone, width = _backbone(shape, channels_last=settings.scope == "head")
    sizes = (width, shape.ways, shape.ways)
    made = make_algorithms(settings, backbone.to(device), *sizes, cross_entropy, device)
    return made.training


def supervised(shape: Shape, device: torch.device) -> nn.Module:
    """The floor's network: backbone and head."""
    backbone, width = _backbone(shape, channels_last=True)
    return nn.Sequential(backbone, nn.Linear(width, shape.ways)).to(device)


def _backbone(shape: Shape, channels_last: bool) -> tuple[nn.Module, int]:
    settings = {"name": "cnn4", "hidden": shape.hidden, "channels_last": channels_last}
    images = (shape.channels, shape.pixels, shape.pixels)
    return build_backbone(images, ModelSettings.of(settings, "model"))


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
