"""The memory experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.papers.memory import figure
from experiments.papers.memory.measure import Effort, Tick, floor, growth
from experiments.papers.memory.methods import RAJESWARAN, YANG, Method, Shape
from experiments.report.paper_figures import Growth
from experiments.tracking import TrackedExperiment, UserError, record
from experiments.training.peak_memory import process_peak
from l2l_implicit import UnsolvedWarning, checks

ex = TrackedExperiment("memory")
MIB = 2.0**20


@ex.config
def defaults() -> None:
    inner_steps = [1, 2, 5, 10, 20, 50, 100]  # K, Yang et al.
    ways = 5
    shots = 5
    queries = 5
    pixels = 32
    hidden = 64  # filters a layer, those of CIFAR-FS
    imaml_inner_steps = [1, 2, 4, 8, 16, 32]  # K, Rajeswaran et al.
    imaml_ways = 20  # of Omniglot-like images, one channel
    imaml_shots = 5
    imaml_queries = 1
    imaml_pixels = 28
    limit_gib = 4.0  # a step that is forecast to take more is left out
    repetitions = 3  # of the timing
    device = "cpu"
    threads = 1
    seed = 0
    output = "runs"  # the folder of the picture


@ex.named_config
def quick() -> None:
    """Smaller networks and tasks, the small K, each timed once: under a minute."""
    inner_steps = [1, 2, 5, 10]
    hidden = 16
    imaml_inner_steps = [1, 2, 4]
    imaml_ways = 5
    repetitions = 1


def _check(config: Mapping[str, Any]) -> torch.device:
    try:
        names = ("ways", "shots", "queries", "pixels", "hidden", "repetitions")
        for name in (*names, *(f"imaml_{n}" for n in names[:4])):
            checks.count(name, config[name])
        for name in ("inner_steps", "imaml_inner_steps"):
            if not config[name]:
                raise ValueError(f"{name}: expected at least one number, got none; try [1, 5, 20]")
            for number in config[name]:
                checks.count(name, number)
        checks.positive("limit_gib", config["limit_gib"])
        if min(config["pixels"], config["imaml_pixels"]) < 16:
            raise ValueError(
                f"pixels, imaml_pixels: expected at least 16, which four poolings halve, got "
                f"{config['pixels']} and {config['imaml_pixels']}"
            )
        device = torch.device(config["device"])
        torch.zeros(1, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    return device


def _shapes(c: Mapping[str, Any]) -> tuple[Shape, Shape]:
    yang = Shape(c["ways"], c["shots"], c["queries"], 3, c["pixels"], c["hidden"])
    imaml = (c[f"imaml_{name}"] for name in ("ways", "shots", "queries"))
    return yang, Shape(*imaml, 1, c["imaml_pixels"], c["hidden"])


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


def _picture(run: Any, output: str) -> Path:
    name = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "memory.png"


@ex.automain
def memory(
    _run: Any, _config: Mapping[str, Any], limit_gib: float, repetitions: int, threads: int,
    output: str,
) -> dict[str, float]:  # fmt: skip
    """Print the tables; returns how much each method grows, and what rm_metal saves."""
    device, shapes = _check(_config), _shapes(_config)
    torch.set_num_threads(threads)
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
    picture = _picture(_run, output)
    titles = (shapes[0].title, shapes[1].title)
    figure.draw(picture, found[0], found[1], titles, floors)
    _run.add_artifact(picture)
    result = _result(found[0], found[1])
    print("", *(f"{name:64}{value:8.3f}" for name, value in result.items() if ":" in name or
                "over" in name), f"\npicture: {picture}", sep="\n")  # fmt: skip
    return result
