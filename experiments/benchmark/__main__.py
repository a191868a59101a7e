"""The benchmark as a Sacred experiment; see the package."""

from __future__ import annotations

import platform
import time
import warnings
from typing import Any

import torch
from tqdm import tqdm

from experiments.benchmark.cases import BenchmarkSettings, select
from experiments.benchmark.measure import Row, as_markdown, summary
from experiments.ingredients.model import device_of, use_threads, within_limits
from experiments.tracking import TrackedExperiment, record
from experiments.training.outcome import folder_of
from experiments.training.peak_memory import keep_freed_memory
from l2l_implicit import UnsolvedWarning

ex = TrackedExperiment("benchmark", settings=BenchmarkSettings)


@ex.named_config
def quick() -> None:
    """Three repetitions, small tasks, the ends of the ranges: under a minute, and rougher."""
    cases = "cnn4-32px,chunked,meta-batch,head,k-sweep,peers,imaml"
    repetitions = 3
    peer_steps = [5]
    sweep_steps = [5, 200]
    network_steps = [1, 5]


def _machine(device: str, threads: int) -> str:
    """Where and when this was measured."""
    name = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{time.strftime('%Y-%m-%d')}, {name}, threads: {threads}, torch {torch.__version__}"


@ex.automain
@within_limits()
def benchmark(_run: Any, cases: str, threads: int, output: str) -> dict[str, int]:
    """Print the table; returns how many bars are met, and how many there are.

    The table as Markdown goes into a folder of the run's own and into the database.
    """
    chosen, settings = select(cases), BenchmarkSettings.of(_run.config)
    settings = settings.model_copy(update={"device": str(device_of(settings.device))})
    use_threads(threads)
    folder = folder_of(_run, output)
    keep_freed_memory()  # as experiments.train does; every method is faster for it
    machine = _machine(settings.device, threads)
    rows: list[Row] = []
    tables = [f"{machine}."]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        for name, case in tqdm(chosen.items(), desc="cases"):
            found = case(settings)
            for index, row in enumerate(found):
                values = {f"{name}/{row.method}/{key}": v for key, v in row.metrics.items()}
                record(_run, values, index)
            command = f"python -m experiments.benchmark with cases={name}"
            tables.append(f"```\n{command}\n```\n\n{as_markdown(found)}")
            tqdm.write(tables[-1] + "\n")
            rows += found
    bars, *missed = summary(rows)
    tables.append("\n".join([f"{bars}.", "", *(f"- {line}" for line in missed)]).strip())
    print("", tables[-1], machine, sep="\n\n")
    (folder / "benchmark.md").write_text("\n\n".join(tables) + "\n")
    _run.add_artifact(folder / "benchmark.md")
    print(f"\ntable: {folder}")
    asked = [bar for row in rows for bar in row.bars]
    return {"met": sum(bar.met for bar in asked), "bars": len(asked)}
