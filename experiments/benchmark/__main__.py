"""The benchmark as a Sacred experiment; see the package."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.benchmark.cases import Plan, select
from experiments.benchmark.measure import Effort
from experiments.benchmark.problem import Setting
from experiments.benchmark.table import Row, as_markdown, as_text, draw, summary
from experiments.ingredients.model import device_of, use_threads, within_limits
from experiments.tracking import TrackedExperiment, record
from experiments.tracking.config import Count, Counts, Positive, RunSettings, Seed, Text, Threads
from experiments.training.outcome import new_folder
from experiments.training.peak_memory import keep_freed_memory
from l2l_implicit import UnsolvedWarning


class BenchmarkSettings(RunSettings):
    """The settings of this experiment."""

    cases: Text = "all"  # names with commas: see experiments/benchmark/cases.py
    repetitions: Count = 30  # of each method
    # a method that took this long in all is repeated no further (but 3 times)
    seconds: Positive = 20.0
    steps: Count = 20  # inner steps K
    cg_steps: Count = 20  # conjugate gradient steps N
    peer_steps: Counts = [1, 5, 20, 100]  # K (and N) of the comparison with other methods
    sweep_steps: Counts = [5, 20, 50, 100, 200]  # K, at N = cg_steps
    sweep_cg_steps: Counts = [5, 10, 20, 50, 100]  # N, at K = steps
    memory_steps: Counts = [1, 10, 100, 1000, 10000]  # K at which memory is measured
    network_steps: Counts = [1, 5, 20]  # K (and N) of iMAML on the whole network
    hidden: Count = 64  # filters a layer of cnn4 (at 84 pixels: 32 at most)
    chunk_size: Count = 25  # images
    channels_last: bool = True  # for every method
    device: Text = "cpu"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of all random numbers
    output: Text = "runs"  # the folder of the table and the picture


ex = TrackedExperiment("benchmark", settings=BenchmarkSettings)


@ex.named_config
def quick() -> None:
    """Three repetitions, small tasks, the ends of the ranges: under a minute, and rougher."""
    cases = "cnn4-32px,20-shot,wide,chunked,meta-batch,head,k-sweep,n-sweep,k-memory,peers,imaml"
    repetitions = 3
    peer_steps = [5]
    sweep_steps = [5, 200]
    sweep_cg_steps = [5, 100]
    memory_steps = [1, 1000]
    network_steps = [1, 5]


def _plan(config: Mapping[str, Any]) -> Plan:
    """The configuration as the cases read it."""
    sequences = ("peer", "sweep", "sweep_cg", "memory", "network")
    return Plan(
        Setting(config["device"], config["channels_last"], config["seed"]),
        Effort(config["repetitions"], config["seconds"]),
        **{key: config[key] for key in ("hidden", "steps", "cg_steps", "chunk_size")},
        **{f"{key}_steps": config[f"{key}_steps"] for key in sequences},
    )


def _record(run: Any, case: str, rows: list[Row]) -> None:
    for index, row in enumerate(rows):
        values = {f"{case}/{row.method}/{key}": v for key, v in row.metrics.items()}
        record(run, values, index)


def _markdown(rows: Mapping[str, list[Row]], machine: str) -> str:
    """Every table under the command that repeats it, and what missed its bar."""
    parts = [f"{machine}."]
    for name, of in rows.items():
        command = f"python -m experiments.benchmark with cases={name}"
        parts.append(f"```\n{command}\n```\n\n{as_markdown(of)}")
    bars, *missed = summary([row for of in rows.values() for row in of]).splitlines()
    parts.append("\n".join([f"{bars}.", "", *(f"- {line}" for line in missed)]).strip())
    return "\n\n".join(parts) + "\n"


def _machine(device: str, threads: int) -> str:
    """Where and when this was measured."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    return f"{time.strftime('%Y-%m-%d')}, {name}, threads: {threads}, torch {torch.__version__}"


def _processor() -> str:
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"


def _save(run: Any, rows: dict[str, list[Row]], device: str, threads: int, folder: Path) -> Path:
    """The table as Markdown and the picture, in a folder of the run's own and in the database."""
    (folder / "benchmark.md").write_text(_markdown(rows, _machine(device, threads)))
    run.add_artifact(folder / "benchmark.md")
    if "peers" in rows:
        draw(folder / "benchmark.png", _machine(device, threads), rows["peers"])
        run.add_artifact(folder / "benchmark.png")
    return folder


@ex.automain
@within_limits()
def benchmark(
    _run: Any, _config: Mapping[str, Any], cases: str, device: str, threads: int, output: str
) -> dict[str, int]:
    """Print the table; returns how many bars are met, and how many there are."""
    device = str(device_of(device))
    chosen, plan = select(cases), _plan({**_config, "device": device})
    use_threads(threads)
    folder = new_folder(_run, output)
    keep_freed_memory()  # as experiments.train does; every method is faster for it
    rows: dict[str, list[Row]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # random images are not the point here
        for name, case in tqdm(chosen.items(), desc="cases"):
            rows[name] = case(plan)
            _record(_run, name, rows[name])
            tqdm.write(as_text(rows[name]))
    everything = [row for of in rows.values() for row in of]
    print("", summary(everything), _machine(device, threads), sep="\n\n")
    print(f"\ntable and picture: {_save(_run, rows, device, threads, folder)}")
    bars = [bar for row in everything for bar in row.bars]
    return {"met": sum(bar.met for bar in bars), "bars": len(bars)}
