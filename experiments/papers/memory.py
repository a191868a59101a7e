"""Peak memory against inner steps: Yang et al. (2025), Fig. 2; Rajeswaran et al. (2019), Fig. 2b.

    python -m experiments.papers.memory
    python -m experiments.papers.memory with quick

One task's outer step, K by K, as far as the memory allows.
"""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import gc
import statistics
import timeit
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.ingredients.model import (
    ModelSettings,
    build_backbone,
    device_of,
    use_threads,
    within_limits,
)
from experiments.report.columns import MIB
from experiments.report.paper_figures import Growth, Point, memory_panel
from experiments.tracking import TrackedExperiment, record
from experiments.tracking.config import Count, Counts, Positive, RunSettings, Seed, Text, Threads
from experiments.training.algorithms import Algorithm
from experiments.training.episodes import Episode
from experiments.training.outcome import folder_of
from experiments.training.peak_memory import peak_memory, process_peak
from l2l_implicit import UnsolvedWarning

Pixels = Annotated[int, Field(ge=16, le=10_000)]  # four poolings halve them


class MemorySettings(RunSettings):
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
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of all random numbers
    output: Text = "runs"  # the folder of the picture


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
GRADIENT = {"step": "gradient"}
Method = Mapping[str, Any]
"""A name of the algorithm table, and what is changed there."""

YANG: dict[str, Method] = {
    "rm_metal/cached": {"name": "rm_metal", **GRADIENT},
    "rm_metal/as_published": {"name": "rm_metal", **GRADIENT, **PUBLISHED},
    "maml/as_published": {"name": "maml"},
    "anil/as_published": {"name": "anil", **PUBLISHED},
    "anil/cached": {"name": "anil"},
    "itd_bio/as_published": {"name": "itd_bio", **PUBLISHED},
    "itd_bio/cached": {"name": "itd_bio"},
}
RAJESWARAN: dict[str, Method] = {
    "imaml/gradient": {"name": "imaml_gd", **GRADIENT},
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

    @property
    def title(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class, "
            f"CNN4-{self.hidden}, {self.pixels} x {self.pixels}"
        )


class Effort(NamedTuple):
    """How much memory a step may take, in bytes, and how often it is timed after that."""

    limit: float
    repetitions: int


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
    if settings.together is not None:  # one task in memory at a time
        settings = settings.model_copy(update={"together": False})
    # Second derivatives of batch norm are slow in channels_last.
    backbone, width = _backbone(shape, channels_last=settings.scope == "head")
    sizes = (width, shape.ways, shape.ways)
    return make_algorithms(settings, backbone.to(device), *sizes, cross_entropy, device).training


def _backbone(shape: Shape, channels_last: bool) -> tuple[nn.Module, int]:
    settings = {"name": "cnn4", "hidden": shape.hidden, "channels_last": channels_last}
    images = (shape.channels, shape.pixels, shape.pixels)
    return build_backbone(images, ModelSettings.of(settings, "model"))


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
    gc.collect()
    return peak_memory(step, device)


def growth(
    method: Method, shape: Shape, steps: Sequence[int], effort: Effort, device: torch.device,
    tick: Callable[[int], object],
) -> Growth:  # fmt: skip
    """Measure at every K, ascending, until the next would take more memory than is allowed."""
    torch.manual_seed(0)
    algorithm, task = build(method, shape, device), episode(shape, device)

    def step() -> None:
        algorithm.learn([task], lambda predictions, targets: 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # leaves the gradients' own memory behind
    found = Growth({}, [])
    for algorithm.steps in steps:
        if found.left_out or forecast(found.points, algorithm.steps) > effort.limit:
            found.left_out.append(algorithm.steps)
        else:
            gc.collect()
            peak = peak_memory(step, device)
            times = timeit.repeat(step, repeat=effort.repetitions, number=1)
            found.points[algorithm.steps] = Point(peak, statistics.median(times))
        tick(1)
    return found


def forecast(points: dict[int, Point], steps: int) -> float:
    """Bytes that K = ``steps`` will take, by a straight line through the last two peaks.

    0 where fewer than two points are known.
    """
    if len(points) < 2:
        return 0.0
    (k0, before), (k1, last) = list(points.items())[-2:]
    return last.peak + (last.peak - before.peak) / (k1 - k0) * (steps - k1)


def _text(title: str, least: float, steps: Sequence[int], found: Mapping[str, Growth]) -> str:
    """MiB and seconds, one line a method; `-` where the memory did not allow it."""
    rows: list[tuple[str, Sequence[Any]]] = []
    for what, scale, head in (("peak", MIB, f"MiB (a supervised step: {least / MIB:.1f})"),
                              ("seconds", 1.0, "seconds")):  # fmt: skip
        rows.append((head, steps))
        for name, each in found.items():
            points = [each.points.get(k) for k in steps]
            cells = [f"{getattr(p, what) / scale:.4g}" if p else "-" for p in points]
            rows.append((f"  {name}", cells))
    lines = [f"{name:32}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in rows]
    return "\n".join(["", title, *lines])


def _result(yang: Mapping[str, Growth], imaml: Mapping[str, Growth]) -> dict[str, float]:
    """Growth from the smallest K to the largest that was measured; savings at K = 5.

    That is the memory of each method over rm_metal's in the same variant and with the cache.
    """
    result: dict[str, float] = {"process_peak_bytes": float(process_peak())}
    for paper, found in (("yang", yang), ("rajeswaran", imaml)):
        for name, each in found.items():
            peaks = [point.peak for point in each.points.values()]
            result[f"{paper}: {name}: largest over smallest"] = peaks[-1] / peaks[0]
    ours = {v: yang[f"rm_metal/{v}"].points for v in ("cached", "as_published")}
    k = 5 if 5 in ours["cached"] else max(ours["cached"])
    return result | {
        f"{name} over rm_metal/{variant} at K = {k}": each.points[k].peak / points[k].peak
        for name, each in yang.items()
        for variant, points in ours.items()
        if k in each.points and not name.startswith("rm_metal")
    }


def _draw(
    found: Sequence[Mapping[str, Growth]], titles: Sequence[str], floors: Sequence[float]
) -> Figure:
    """Both papers' memory, and Rajeswaran's compute."""
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    axes = figure.subplots(1, 3)
    memory_panel(axes[0], found[0], "peak", floors[0])
    memory_panel(axes[1], found[1], "peak", floors[1])
    memory_panel(axes[2], found[1], "seconds")
    axes[0].set_title(f"Yang et al., Fig. 2\n{titles[0]}")
    for cell in axes[1:]:
        cell.set_title(f"Rajeswaran et al., Fig. 2b\n{titles[1]}")
    return figure


@ex.automain
@within_limits()
def memory(_run: Any, output: str) -> dict[str, float]:
    """Print the tables; returns how much each method grows, and what rm_metal saves."""
    c = MemorySettings.of(_run.config)
    device = device_of(c.device)
    use_threads(c.threads)
    picture = folder_of(_run, output) / "memory.png"
    effort = Effort(c.limit_gib * 2**30, c.repetitions)
    shapes = (
        Shape(c.ways, c.shots, c.queries, c.pixels, c.hidden),
        Shape(c.imaml_ways, c.imaml_shots, c.imaml_queries, c.imaml_pixels, c.hidden, 1),
    )
    steps = [sorted(set(k)) for k in (c.inner_steps, c.imaml_inner_steps)]
    found: list[dict[str, Growth]] = []
    total = len(YANG) * len(steps[0]) + len(RAJESWARAN) * len(steps[1])
    with warnings.catch_warnings(), tqdm(total=total, desc="points") as bar:
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        floors = [floor(shape, device) for shape in shapes]
        for prefix, methods, shape, k in zip(("", "imaml_"), (YANG, RAJESWARAN), shapes, steps,
                                             strict=True):  # fmt: skip
            found.append({})
            for name, method in methods.items():
                found[-1][name] = growth(method, shape, k, effort, device, bar.update)
                for at, point in found[-1][name].points.items():  # as soon as it is there
                    values = {f"{prefix}{what}/{name}": value
                              for what, value in zip(("memory", "seconds"), point, strict=True)}
                    record(_run, values, at)
    record(_run, {"memory/supervised": floors[0], "imaml_memory/supervised": floors[1]}, 0)
    titles = [shape.title for shape in shapes]
    for table in zip(titles, floors, steps, found, strict=True):
        print(_text(*table))
    _draw(found, titles, floors).savefig(picture, dpi=120)
    _run.add_artifact(picture)
    result = _result(*found)
    shown = {name: value for name, value in result.items() if name != "process_peak_bytes"}
    print("", *(f"{name:64}{value:8.3f}" for name, value in shown.items()),
          f"\npicture: {picture}", sep="\n")  # fmt: skip
    return result
