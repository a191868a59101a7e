"""The memory experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from experiments.benchmark.problem import Shape
from experiments.ingredients.model import device_of, use_threads, within_limits
from experiments.papers.memory import figure
from experiments.papers.memory.measure import (
    RAJESWARAN,
    YANG,
    Effort,
    Method,
    Tick,
    floor,
    growth,
)
from experiments.report.paper_figures import Growth
from experiments.tracking import TrackedExperiment, record
from experiments.tracking.config import Count, Counts, Positive, RunSettings, Seed, Text, Threads
from experiments.training.outcome import new_folder
from experiments.training.peak_memory import process_peak
from l2l_implicit import UnsolvedWarning

MIB = 2.0**20
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


def _shapes(c: Mapping[str, Any]) -> tuple[Shape, Shape]:
    sizes = ("ways", "shots", "queries", "pixels")
    yang, imaml = ({name: c[prefix + name] for name in sizes} for prefix in ("", "imaml_"))
    return Shape(hidden=c["hidden"], **yang), Shape(hidden=c["hidden"], channels=1, **imaml)


def _all(
    run: Any, prefix: tuple[str, str], methods: Mapping[str, Method], shape: Shape,
    steps: Sequence[int], effort: Effort, device: torch.device, tick: Tick,
) -> dict[str, Growth]:  # fmt: skip
    """Measure every method, and record each as soon as it is there."""
    found = {}
    for name, method in methods.items():
        found[name] = growth(method, shape, steps, effort, device, tick)
        for k, point in found[name].points.items():
            values = {f"{prefix[0]}/{name}": point.peak, f"{prefix[1]}/{name}": point.seconds}
            record(run, values, k)
    return found


def _text(title: str, least: float, steps: Sequence[int], found: Mapping[str, Growth]) -> str:
    """MiB and seconds, one line a method; `-` where the memory did not allow it."""
    lines = ["", title, f"{'MiB (a supervised step: %.1f)' % (least / MIB):32}" + _heads(steps)]
    for what, scale in (("peak", MIB), ("seconds", 1.0)):
        if what == "seconds":
            lines.append(f"{'seconds':32}" + _heads(steps))
        for name, each in found.items():
            points = (each.points.get(k) for k in steps)
            cells = ("-" if p is None else f"{getattr(p, what) / scale:.4g}" for p in points)
            lines.append(f"  {name:30}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def _heads(steps: Sequence[int]) -> str:
    return "".join(f"{k:9d}" for k in steps)


def savings(found: Mapping[str, Growth], steps: int) -> dict[str, float]:
    """Memory of each method at K, over that of rm_metal in the same variant and with the cache.

    Raises:
        KeyError: rm_metal was not measured at that K.
    """
    ours = {v: found[f"rm_metal/{v}"].points[steps].peak for v in ("cached", "as_published")}
    return {
        f"{name} over rm_metal/{variant} at K = {steps}": each.points[steps].peak / peak
        for name, each in found.items()
        for variant, peak in ours.items()
        if steps in each.points and not name.startswith("rm_metal")
    }


def _result(yang: Mapping[str, Growth], imaml: Mapping[str, Growth]) -> dict[str, float]:
    """Growth from the smallest K to the largest that was measured; savings at K = 5."""
    result: dict[str, float] = {"process_peak_bytes": float(process_peak())}
    for paper, found in (("yang", yang), ("rajeswaran", imaml)):
        for name, each in found.items():
            peaks = [point.peak for point in each.points.values()]
            result[f"{paper}: {name}: largest over smallest"] = peaks[-1] / peaks[0]
    at = 5 if 5 in yang["rm_metal/cached"].points else max(yang["rm_metal/cached"].points)
    return result | savings(yang, at)


@ex.automain
@within_limits()
def memory(
    _run: Any, _config: Mapping[str, Any], limit_gib: float, repetitions: int, threads: int,
    output: str,
) -> dict[str, float]:  # fmt: skip
    """Print the tables; returns how much each method grows, and what rm_metal saves."""
    device, shapes = device_of(_config["device"]), _shapes(_config)
    use_threads(threads)
    picture = new_folder(_run, output) / "memory.png"
    effort = Effort(limit_gib * 2**30, repetitions)
    steps = [sorted(set(_config[name])) for name in ("inner_steps", "imaml_inner_steps")]
    total = len(YANG) * len(steps[0]) + len(RAJESWARAN) * len(steps[1])
    with warnings.catch_warnings(), tqdm(total=total, desc="points") as bar:
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        floors = floor(shapes[0], device), floor(shapes[1], device)
        names = (("memory", "seconds"), YANG), (("imaml_memory", "imaml_seconds"), RAJESWARAN)
        found = [
            _all(_run, prefix, methods, shape, k, effort, device, bar.update)
            for (prefix, methods), shape, k in zip(names, shapes, steps, strict=True)
        ]
    record(_run, {"memory/supervised": floors[0], "imaml_memory/supervised": floors[1]}, 0)
    for shape, least, k, each in zip(shapes, floors, steps, found, strict=True):
        print(_text(shape.title, least, k, each))
    titles = (shapes[0].title, shapes[1].title)
    figure.draw(picture, found[0], found[1], titles, floors)
    _run.add_artifact(picture)
    result = _result(found[0], found[1])
    print("", *(f"{name:64}{value:8.3f}" for name, value in result.items() if ":" in name or
                "over" in name), f"\npicture: {picture}", sep="\n")  # fmt: skip
    return result
